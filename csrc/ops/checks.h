// Checks the arguments of ops on the host: each error names the argument and prints its value.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdio>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "../rows/sequences.h"

namespace rhythm_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The parts of a message. No streams are used: where a compiler links its own C++ library into the extension, their
// locales are mixed with those of torch's library, and writing a number crashes.
inline std::string text_of(const char* text) { return text; }
inline std::string text_of(const std::string& text) { return text; }
inline std::string text_of(int64_t number) { return std::to_string(number); }
inline std::string text_of(double number) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", number);
  return text;
}

inline std::string text_of(const Tensor& tensor) {  // its shape
  std::string text = "[";
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    text += (dim > 0 ? ", " : "") + std::to_string(tensor.size(dim));
  }
  return text + "]";
}

// Throws a message of the parts, which are not looked at otherwise.
template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) {
    throw std::invalid_argument((text_of(parts) + ...));
  }
}

inline std::string device_of(const Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "cpu";
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  check(
      tensor.scalar_type() == dtype,
      op,
      ": ",
      name,
      " must be ",
      torch::headeronly::toString(dtype),
      ", got ",
      torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& response_mask) {
  const std::string wanted = device_of(response_mask);
  const std::string found = device_of(tensor);
  check(wanted == found, op, ": ", name, " must be on the device of response_mask, ", wanted, ", got ", found);
}

// A batch's response_mask [B,T] and its sequences, with the tensors that hold their memory.
struct Batch {
  Tensor response_mask;  // contiguous
  std::optional<Tensor> cu_seqlens;
  Sequences sequences;

  const uint8_t* response_mask_ptr() const { return static_cast<const uint8_t*>(response_mask.const_data_ptr()); }
};

// response_mask is bool [B,T], cu_seqlens int32 [S+1] with B = 1. T must fit an int32, since positions and counts in a
// row are int32. The values of cu_seqlens are checked by the device that runs the rows.
inline Batch check_batch(const char* op, const Tensor& response_mask, const std::optional<Tensor>& cu_seqlens) {
  check_dtype(op, "response_mask", response_mask, ScalarType::Bool);
  check(response_mask.dim() == 2, op, ": response_mask must have shape [B, T], got ", response_mask);
  const int64_t tokens = response_mask.size(1);
  check(
      tokens <= std::numeric_limits<int32_t>::max(),
      op,
      ": response_mask must have fewer than 2^31 tokens a row, got ",
      tokens);
  Batch batch{torch::stable::contiguous(response_mask), std::nullopt, {response_mask.size(0), tokens, nullptr}};
  if (!cu_seqlens.has_value()) {
    return batch;
  }
  check_dtype(op, "cu_seqlens", *cu_seqlens, ScalarType::Int);
  check(
      cu_seqlens->dim() == 1 && cu_seqlens->size(0) > 0, op, ": cu_seqlens must have shape [S + 1], got ", *cu_seqlens);
  check(response_mask.size(0) == 1, op, ": cu_seqlens needs a batch of one row, got B = ", response_mask.size(0));
  check_device(op, "cu_seqlens", *cu_seqlens, response_mask);
  batch.cu_seqlens = torch::stable::contiguous(*cu_seqlens);
  const auto* cuts = static_cast<const int32_t*>(batch.cu_seqlens->const_data_ptr());
  batch.sequences = {cu_seqlens->size(0) - 1, tokens, cuts};
  return batch;
}

// Returns a signal fp32 [B,T], contiguous.
inline Tensor check_signal(const char* op, const char* name, const Tensor& values, const Batch& batch) {
  check_dtype(op, name, values, ScalarType::Float);
  check(
      values.dim() == 2 && values.size(0) == batch.response_mask.size(0) &&
          values.size(1) == batch.response_mask.size(1),
      op,
      ": ",
      name,
      " must have the shape of response_mask, ",
      batch.response_mask,
      ", got ",
      values);
  check_device(op, name, values, batch.response_mask);
  return torch::stable::contiguous(values);
}

// NaN fails too.
inline void check_fraction(const char* op, const char* name, double value) {
  check(value >= 0.0 && value <= 1.0, op, ": ", name, " must be in [0, 1], got ", value);
}

// ---- outputs

inline Tensor new_like_response_mask(const Batch& batch, ScalarType dtype) {
  return torch::stable::new_empty(batch.response_mask, batch.response_mask.sizes(), dtype);
}

inline Tensor new_per_sequence(const Batch& batch, ScalarType dtype) {
  return torch::stable::new_empty(batch.response_mask, {batch.sequences.count}, dtype);
}

inline Tensor new_none(const Batch& batch, ScalarType dtype) {
  return torch::stable::new_empty(batch.response_mask, {0}, dtype);
}

// Where cu_seqlens is wrong no sequence exists, so none writes its output; on a GPU that is known too late for an
// error.
inline void fill_if_packed(const Batch& batch, Tensor& output, double value) {
  if (batch.sequences.cu_seqlens != nullptr) {
    torch::stable::fill_(output, value);
  }
}

template <typename T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* pointer(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace rhythm_kernels
