// find_peaks on CUDA.
#include "../ops/peaks.h"

#include <torch/csrc/stable/library.h>

#include "run.cuh"

STABLE_TORCH_LIBRARY_IMPL(rhythm_kernels, CUDA, m) {
  m.impl("find_peaks", TORCH_BOX(&rhythm_kernels::find_peaks<rhythm_kernels::cuda::Device>));
}
