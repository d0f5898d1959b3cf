// The last key taken of one row, on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "../select.h"

namespace rhythm_kernels::cpu {

inline uint32_t key_at(const float* values, const uint8_t* mask, int64_t t) {
  return mask[t] ? order_key(values[t]) : kNoKey;
}

// Threshold of the ceil(fraction n) largest (or smallest) of the n masked values, in rank keys. `keys` is scratch with
// room for every token. Linear in the tokens: each step keeps only the keys that can still be the one searched for.
inline Threshold select_threshold(
    const float* values,
    const uint8_t* mask,
    int32_t tokens,
    double fraction,
    bool largest,
    std::vector<uint32_t>& keys) {
  int32_t n = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    keys[n] = rank_key(order_key(values[t]), largest);
    n += mask[t] != 0;
  }
  const int32_t count = selection_count(fraction, n);
  if (count == 0) {
    return take_nothing();
  }
  RadixSearch search{0, count, n};
  for (int step = 0; step < kDigits; ++step) {
    int32_t histogram[kBins] = {};
    for (int32_t i = 0; i < search.sharing; ++i) {
      ++histogram[digit_of(keys[i], step)];
    }
    const int32_t candidates = search.sharing;
    search = descend(histogram, search.prefix, search.remaining, kBins - 1, 0);
    int32_t kept = 0;
    for (int32_t i = 0; i < candidates; ++i) {
      const uint32_t key = keys[i];
      keys[kept] = key;
      kept += starts_with(key, search.prefix, step + 1);
    }
  }
  return to_threshold(search);
}

// Rows that a thread takes at a time: enough tokens to be worth starting it.
inline int64_t row_grain(int64_t tokens) {
  constexpr int64_t kTokensPerThread = 16384;
  return tokens >= kTokensPerThread ? 1 : kTokensPerThread / (tokens > 0 ? tokens : 1);
}

}  // namespace rhythm_kernels::cpu
