// segment_topq on the CPU.
#include "../ops/topq.h"

#include <torch/csrc/stable/library.h>

#include "run.h"

STABLE_TORCH_LIBRARY_IMPL(rhythm_kernels, CPU, m) {
  m.impl("segment_topq", TORCH_BOX(&rhythm_kernels::segment_topq<rhythm_kernels::cpu::Device>));
}
