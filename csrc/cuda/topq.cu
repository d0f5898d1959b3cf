// segment_topq on CUDA.
#include "../ops/topq.h"

#include <torch/csrc/stable/library.h>

#include "run.cuh"

STABLE_TORCH_LIBRARY_IMPL(rhythm_kernels, CUDA, m) {
  m.impl("segment_topq", TORCH_BOX(&rhythm_kernels::segment_topq<rhythm_kernels::cuda::Device>));
}
