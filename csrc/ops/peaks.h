// The op find_peaks, for a device that runs rows.
#pragma once

#include <optional>

#include "../rows/peaks.h"
#include "checks.h"

namespace rhythm_kernels {

template <class Device>
Tensor find_peaks(
    const Tensor& values, const Tensor& response_mask, const std::optional<Tensor>& cu_seqlens, double min_quantile) {
  const char* op = "find_peaks";
  const Batch batch = check_batch(op, response_mask, cu_seqlens);
  const Tensor signal = check_signal(op, "values", values, batch);
  check_fraction(op, "min_quantile", min_quantile);
  Tensor peaks = new_like_response_mask(batch, ScalarType::Bool);
  fill_if_packed(batch, peaks, 0);
  const Peaks row{pointer<float>(signal), batch.response_mask_ptr(), pointer<uint8_t>(peaks), min_quantile};
  Device::run(op, row, batch.sequences, batch.response_mask);
  return peaks;
}

}  // namespace rhythm_kernels
