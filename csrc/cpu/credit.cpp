// topq_credit and coupled_credit on the CPU.
#include "../ops/credit.h"

#include <torch/csrc/stable/library.h>

#include "run.h"

STABLE_TORCH_LIBRARY_IMPL(rhythm_kernels, CPU, m) {
  m.impl("topq_credit", TORCH_BOX(&rhythm_kernels::topq_credit<rhythm_kernels::cpu::Device>));
  m.impl("coupled_credit", TORCH_BOX(&rhythm_kernels::coupled_credit<rhythm_kernels::cpu::Device>));
}
