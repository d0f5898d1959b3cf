// find_peaks on the CPU: one pass from right to left over each row, rows shared among threads.
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

void mark_peaks(const float* values, const uint8_t* mask, uint8_t* peaks, int32_t tokens, uint32_t floor) {
  uint32_t next = kNoKey;
  uint32_t key = tokens > 0 ? key_at(values, mask, tokens - 1) : kNoKey;
  bool falls = false;  // whether the plateau of this position ends in a step down
  for (int64_t t = int64_t{tokens} - 1; t >= 0; --t) {
    const uint32_t previous = t > 0 ? key_at(values, mask, t - 1) : kNoKey;
    if (plateau_ends(key, next)) {
      falls = is_lower(next, key);
    }
    peaks[t] = is_peak(previous, key, falls, floor);
    next = key;
    key = previous;
  }
}

Tensor find_peaks(const Tensor& values, const Tensor& mask, double min_quantile) {
  check_rows("find_peaks", values, mask);
  check_fraction("find_peaks", "min_quantile", min_quantile);
  const int64_t rows = values.size(0);
  const int64_t tokens = values.size(1);
  const Tensor values_rows = torch::stable::contiguous(values);
  const Tensor mask_rows = torch::stable::contiguous(mask);
  Tensor peaks = torch::stable::new_empty(mask_rows, mask_rows.sizes());
  const auto* values_ptr = static_cast<const float*>(values_rows.const_data_ptr());
  const auto* mask_ptr = static_cast<const uint8_t*>(mask_rows.const_data_ptr());
  auto* peaks_ptr = static_cast<uint8_t*>(peaks.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, row_grain(tokens), [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> keys(min_quantile > 0 ? tokens : 0);
    for (int64_t row = begin; row < end; ++row) {
      const float* row_values = values_ptr + row * tokens;
      const uint8_t* row_mask = mask_ptr + row * tokens;
      uint32_t floor = kNoKey;
      if (min_quantile > 0) {
        floor = peak_floor(select_threshold(
            row_values, row_mask, static_cast<int32_t>(tokens), min_quantile, /*largest=*/false, keys));
      }
      mark_peaks(row_values, row_mask, peaks_ptr + row * tokens, static_cast<int32_t>(tokens), floor);
    }
  });
  return peaks;
}

}  // namespace
}  // namespace rhythm_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(rhythm_kernels, CPU, m) { m.impl("find_peaks", TORCH_BOX(&rhythm_kernels::cpu::find_peaks)); }
