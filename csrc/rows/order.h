// Turns fp32 numbers into integer keys that have their order, and says how many of n are taken.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define RK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RK_HOST_DEVICE inline
#endif

// Keeps nvcc from unrolling the loop behind it, which has few turns.
#ifdef __CUDA_ARCH__
#define RK_SHORT_LOOP _Pragma("unroll 1")
#else
#define RK_SHORT_LOOP
#endif

namespace rhythm_kernels {

// Keys compare as the numbers do, and -0.0 has the key of +0.0. The first two are below the key of every number.
constexpr uint32_t kOutside = 0;  // the key of a position outside the response_mask
constexpr uint32_t kNaN = 1;
constexpr uint32_t kMinusInfinity = 0x007fffffu;
constexpr uint32_t kZero = 0x80000000u;
constexpr uint32_t kInfinity = 0xff800000u;

RK_HOST_DEVICE uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

RK_HOST_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

// Computes with integers only, so that flush-to-zero modes cannot merge denormals.
RK_HOST_DEVICE uint32_t key_of(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return kNaN;
  }
  const bool negative = bits > 0x80000000u;  // -0.0 is not
  return negative ? ~bits : (magnitude | 0x80000000u);
}

RK_HOST_DEVICE uint32_t key_at(const float* values, const uint8_t* response_mask, int32_t t) {
  return response_mask[t] ? key_of(values[t]) : kOutside;
}

// Returns the number that has this key.
RK_HOST_DEVICE float number_of(uint32_t key) { return float_of(key >= kZero ? key ^ kZero : ~key); }

RK_HOST_DEVICE bool is_number(uint32_t key) { return key >= kMinusInfinity; }

RK_HOST_DEVICE bool is_finite(uint32_t key) { return key > kMinusInfinity && key < kInfinity; }

// Turns a key into its rank, of which the largest is taken first, and back. NaN and kOutside stay last either way.
RK_HOST_DEVICE uint32_t rank_of(uint32_t key, bool largest) { return largest || !is_number(key) ? key : ~key; }

// Returns ceil(fraction * n - 1e-9): the slack keeps 0.7 * 10 at 7. Both operations round by themselves, as in Python.
RK_HOST_DEVICE int32_t selection_count(double fraction, int32_t n) {
#ifdef __CUDA_ARCH__
  const double exact = __dsub_rn(__dmul_rn(fraction, static_cast<double>(n)), 1e-9);
#else
  const double product = fraction * static_cast<double>(n);
  const double exact = product - 1e-9;
#endif
  const double count = ceil(exact);
  return count <= 0 ? 0 : count >= n ? n : static_cast<int32_t>(count);
}

}  // namespace rhythm_kernels
