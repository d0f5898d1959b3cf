// The rules of selection, shared by the CPU and the CUDA ops: the order of fp32 values, how many are taken, the
// digit-by-digit search for the last one taken, and what a peak is.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define RK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RK_HOST_DEVICE inline
#endif

namespace rhythm_kernels {

// The key of NaN, and of a position outside the mask: below the key of every number.
constexpr uint32_t kNoKey = 0;

// Keys compare as the numbers do, -0.0 equals +0.0. Integer work only, so flush-to-zero modes cannot merge denormals.
RK_HOST_DEVICE uint32_t order_key(float value) {
  uint32_t bits;
#ifdef __CUDA_ARCH__
  bits = __float_as_uint(value);
#else
  std::memcpy(&bits, &value, sizeof(bits));
#endif
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return kNoKey;
  }
  const bool negative = bits > 0x80000000u;  // -0.0 is not
  return negative ? ~bits : (magnitude | 0x80000000u);
}

// Turns an order key into one whose largest is taken first. Its own inverse; NaN is last in both directions.
RK_HOST_DEVICE uint32_t rank_key(uint32_t key, bool largest) { return key == kNoKey || largest ? key : ~key; }

// ceil(fraction * n - 1e-9): the slack keeps 0.7 * 10 at 7. Both operations round separately, as Python does.
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

constexpr int kDigitBits = 8;
constexpr int kDigits = 32 / kDigitBits;
constexpr int kBins = 1 << kDigitBits;

// Search for the rank-th largest key, most significant digit first. After kDigits steps `prefix` is that key.
struct RadixSearch {
  uint32_t prefix;    // the digits known so far
  int32_t remaining;  // how many are to be taken among the keys that start with prefix
  int32_t sharing;    // how many keys start with prefix
};

RK_HOST_DEVICE uint32_t digit_of(uint32_t key, int step) {
  return (key >> (32 - kDigitBits * (step + 1))) & (kBins - 1);
}

RK_HOST_DEVICE bool starts_with(uint32_t key, uint32_t prefix, int step) {
  return step == 0 || (key >> (32 - kDigitBits * step)) == prefix;
}

// One digit of the search among bins high..low, where `remaining` is counted from bin high downwards.
// Needs 1 <= remaining <= the sum of these bins.
RK_HOST_DEVICE RadixSearch descend(const int32_t* histogram, uint32_t prefix, int32_t remaining, int high, int low) {
  int bin = high;
  while (bin > low && remaining > histogram[bin]) {
    remaining -= histogram[bin];
    --bin;
  }
  return {(prefix << kDigitBits) | static_cast<uint32_t>(bin), remaining, histogram[bin]};
}

// The outcome of a search: keys above `key` are taken, and the first `ties` of those equal to it.
struct Threshold {
  uint32_t key;
  int32_t ties;
  bool all_ties;  // every key equal to `key` is taken, so positions need not be counted
};

// No key is this large.
RK_HOST_DEVICE Threshold take_nothing() { return {0xffffffffu, 0, true}; }

// A search that ends at NaN has taken every number: its threshold is below them and above NaN.
RK_HOST_DEVICE Threshold to_threshold(const RadixSearch& search) {
  if (search.prefix == kNoKey) {
    return {kNoKey + 1, 0, true};
  }
  return {search.prefix, search.remaining, search.remaining == search.sharing};
}

// A plateau is a stretch of equal keys. The neighbour after its end decides whether it falls.
RK_HOST_DEVICE bool plateau_ends(uint32_t key, uint32_t next) { return key != next; }

// The `<` of IEEE floats, where a missing neighbour is like a NaN: never lower.
RK_HOST_DEVICE bool is_lower(uint32_t neighbour, uint32_t key) { return neighbour != kNoKey && neighbour < key; }

// True at the first position of a plateau that is higher than both its neighbours and reaches `floor`.
RK_HOST_DEVICE bool is_peak(uint32_t previous, uint32_t key, bool falls, uint32_t floor) {
  return falls && is_lower(previous, key) && key >= floor;
}

// The smallest order key that a peak may have, given the threshold of the ceil(p n) smallest values. An empty selection
// admits every peak, one that ends at NaN admits none: both follow from their thresholds' keys.
RK_HOST_DEVICE uint32_t peak_floor(const Threshold& smallest) { return ~smallest.key; }

}  // namespace rhythm_kernels
