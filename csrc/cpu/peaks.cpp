// find_peaks on the CPU.
#include "../ops/peaks.h"

#include <torch/csrc/stable/library.h>

#include "run.h"

STABLE_TORCH_LIBRARY_IMPL(rhythm_kernels, CPU, m) {
  m.impl("find_peaks", TORCH_BOX(&rhythm_kernels::find_peaks<rhythm_kernels::cpu::Device>));
}
