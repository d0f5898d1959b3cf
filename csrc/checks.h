// Host checks of op arguments: each names the argument and prints what arrived.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

namespace rhythm_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
  }
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    text << (dim ? ", " : "") << tensor.size(dim);
  }
  text << ']';
  return text.str();
}

// values fp32 [B,T], mask bool [B,T] on one device. T is an int32, so that positions and counts within a row are too.
inline void check_rows(const char* op, const Tensor& values, const Tensor& mask) {
  check(
      values.scalar_type() == ScalarType::Float,
      op,
      ": values must be float32, got ",
      torch::headeronly::toString(values.scalar_type()));
  check(
      mask.scalar_type() == ScalarType::Bool,
      op,
      ": mask must be bool, got ",
      torch::headeronly::toString(mask.scalar_type()));
  check(values.dim() == 2, op, ": values must have shape [B, T], got ", shape_of(values));
  check(
      mask.dim() == 2 && mask.size(0) == values.size(0) && mask.size(1) == values.size(1),
      op,
      ": mask must have the shape of values, ",
      shape_of(values),
      ", got ",
      shape_of(mask));
  check(
      values.size(1) <= std::numeric_limits<int32_t>::max(),
      op,
      ": values must have fewer than 2^31 tokens a row, got ",
      values.size(1));
  check(
      values.is_cuda() == mask.is_cuda() && values.get_device_index() == mask.get_device_index(),
      op,
      ": mask must be on the device of values, ",
      values.is_cuda() ? "cuda:" : "cpu:",
      values.get_device_index(),
      ", got ",
      mask.is_cuda() ? "cuda:" : "cpu:",
      mask.get_device_index());
}

// Written so that NaN fails.
inline void check_fraction(const char* op, const char* name, double value) {
  check(value >= 0.0 && value <= 1.0, op, ": ", name, " must be in [0, 1], got ", value);
}

}  // namespace rhythm_kernels
