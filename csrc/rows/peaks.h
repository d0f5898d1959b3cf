// find_peaks of one sequence.
#pragma once

#include <cstdint>

#include "select.h"
#include "sequences.h"

namespace rhythm_kernels {

// Compares as `<` does for IEEE floats. A neighbour that is missing is never lower, as a NaN is not.
RK_HOST_DEVICE bool is_lower(uint32_t neighbour, uint32_t key) { return is_number(neighbour) && neighbour < key; }

// Returns the first set bit at or after position t. Needs one.
RK_HOST_DEVICE int32_t next_marked(const uint32_t* words, int32_t t) {
  int32_t word = t / 32;
  uint32_t bits = words[word] >> (t % 32) << (t % 32);
  while (bits == 0) {
    bits = words[++word];
  }
#ifdef __CUDA_ARCH__
  return word * 32 + __ffs(static_cast<int32_t>(bits)) - 1;
#else
  return word * 32 + __builtin_ctz(bits);
#endif
}

struct Peaks {
  static constexpr int kScratch = 2;

  const float* values;
  const uint8_t* response_mask;
  uint8_t* peaks;
  double min_quantile;

  template <class Team>
  RK_HOST_DEVICE void operator()(Team& team, const Sequence& sequence, uint32_t* keys) const {
    const int32_t tokens = sequence.tokens;
    const float* row_values = values + sequence.begin;
    const uint8_t* in_response = response_mask + sequence.begin;
    uint8_t* row_peaks = peaks + sequence.begin;
    uint32_t* plateau_ends = keys + tokens;
    team.for_each(tokens, [=](int32_t t) { keys[t] = key_at(row_values, in_response, t); });
    const uint32_t floor = find_floor(team, tokens, keys);
    team.mark(tokens, [=](int32_t t) { return t + 1 == tokens || keys[t] != keys[t + 1]; }, plateau_ends);
    team.for_each(tokens, [=](int32_t t) {
      const uint32_t key = keys[t];
      bool peak = t > 0 && is_lower(keys[t - 1], key) && key >= floor;
      if (peak) {  // the value before is lower, so t is the first position of its plateau
        const int32_t after = next_marked(plateau_ends, t) + 1;
        peak = after < tokens && is_lower(keys[after], key);
      }
      row_peaks[t] = peak;
    });
  }

 private:
  // Returns the key of the ceil(p n)-th smallest value, where NaN counts as the largest.
  template <class Team>
  RK_HOST_DEVICE uint32_t find_floor(Team& team, int32_t tokens, const uint32_t* keys) const {
    const int32_t n = team.sum(tokens, [=](int32_t t) { return keys[t] != kOutside; });
    const int32_t count = selection_count(min_quantile, n);
    if (count == 0) {
      return kOutside;
    }
    const auto rank_at = [=](int32_t t) { return rank_of(keys[t], /*largest=*/false); };
    const Search last = search_ranks(team, tokens, count, rank_at, /*as_set=*/false);
    return is_number(last.digits) ? rank_of(last.digits, /*largest=*/false) : 0xffffffffu;  // no key is this high
  }
};

}  // namespace rhythm_kernels
