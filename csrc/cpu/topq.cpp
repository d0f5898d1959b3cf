// segment_topq on the CPU: one row after another, rows shared among threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "../checks.h"
#include "../select.h"
#include "row_select.h"

namespace rhythm_kernels::cpu {
namespace {

void mark_selected(
    const float* values,
    const uint8_t* mask,
    uint8_t* selected,
    int32_t tokens,
    bool largest,
    const Threshold& threshold) {
  if (threshold.all_ties) {
    for (int64_t t = 0; t < tokens; ++t) {
      const uint32_t key = rank_key(order_key(values[t]), largest);
      selected[t] = (mask[t] != 0) & (key >= threshold.key);
    }
    return;
  }
  int32_t ties = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const uint32_t key = rank_key(order_key(values[t]), largest);
    const bool tie = mask[t] && key == threshold.key && ties < threshold.ties;
    ties += tie;
    selected[t] = tie || (mask[t] && key > threshold.key);
  }
}

Tensor segment_topq(const Tensor& values, const Tensor& mask, double q, bool largest) {
  check_rows("segment_topq", values, mask);
  check_fraction("segment_topq", "q", q);
  const int64_t rows = values.size(0);
  const int64_t tokens = values.size(1);
  const Tensor values_rows = torch::stable::contiguous(values);
  const Tensor mask_rows = torch::stable::contiguous(mask);
  Tensor selected = torch::stable::new_empty(mask_rows, mask_rows.sizes());
  const auto* values_ptr = static_cast<const float*>(values_rows.const_data_ptr());
  const auto* mask_ptr = static_cast<const uint8_t*>(mask_rows.const_data_ptr());
  auto* selected_ptr = static_cast<uint8_t*>(selected.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, row_grain(tokens), [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> keys(tokens);
    for (int64_t row = begin; row < end; ++row) {
      const float* row_values = values_ptr + row * tokens;
      const uint8_t* row_mask = mask_ptr + row * tokens;
      const auto threshold = select_threshold(row_values, row_mask, static_cast<int32_t>(tokens), q, largest, keys);
      mark_selected(
          row_values, row_mask, selected_ptr + row * tokens, static_cast<int32_t>(tokens), largest, threshold);
    }
  });
  return selected;
}

}  // namespace
}  // namespace rhythm_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(rhythm_kernels, CPU, m) {
  m.impl("segment_topq", TORCH_BOX(&rhythm_kernels::cpu::segment_topq));
}
