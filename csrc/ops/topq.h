// The op segment_topq, for a device that runs rows.
#pragma once

#include <optional>
#include <tuple>

#include "../rows/topq.h"
#include "checks.h"

namespace rhythm_kernels {

template <class Device>
std::tuple<Tensor, Tensor> segment_topq(
    const Tensor& values,
    const Tensor& response_mask,
    const std::optional<Tensor>& cu_seqlens,
    double top_fraction,
    bool largest) {
  const char* op = "segment_topq";
  const Batch batch = check_batch(op, response_mask, cu_seqlens);
  const Tensor signal = check_signal(op, "values", values, batch);
  check_fraction(op, "top_fraction", top_fraction);
  Tensor selected = new_like_response_mask(batch, ScalarType::Bool);
  Tensor has_nan = new_per_sequence(batch, ScalarType::Bool);
  fill_if_packed(batch, selected, 0);
  const TopQ row{
      pointer<float>(signal),
      batch.response_mask_ptr(),
      pointer<uint8_t>(selected),
      pointer<uint8_t>(has_nan),
      top_fraction,
      largest};
  Device::run(op, row, batch.sequences, batch.response_mask);
  return {selected, has_nan};
}

}  // namespace rhythm_kernels
