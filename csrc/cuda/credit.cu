// topq_credit and coupled_credit on CUDA.
#include "../ops/credit.h"

#include <torch/csrc/stable/library.h>

#include "run.cuh"

STABLE_TORCH_LIBRARY_IMPL(rhythm_kernels, CUDA, m) {
  m.impl("topq_credit", TORCH_BOX(&rhythm_kernels::topq_credit<rhythm_kernels::cuda::Device>));
  m.impl("coupled_credit", TORCH_BOX(&rhythm_kernels::coupled_credit<rhythm_kernels::cuda::Device>));
}
