// A team of one thread.
#pragma once

#include <cstdint>

#include "../rows/select.h"

namespace rhythm_kernels::cpu {

struct Solo {
  template <class F>
  void for_each(int32_t n, F f) {
    for (int32_t i = 0; i < n; ++i) {
      f(i);
    }
  }

  template <class F>
  int32_t sum(int32_t n, F f) {
    int32_t total = 0;
    for (int32_t i = 0; i < n; ++i) {
      total += f(i);
    }
    return total;
  }

  template <class F>
  Bin find_bin(int32_t n, F bin_of, int32_t place) {
    int32_t sizes[kBins] = {};
    for (int32_t i = 0; i < n; ++i) {
      const int32_t bin = bin_of(i);
      if (bin != kNoBin) {
        ++sizes[bin];
      }
    }
    return walk_bins(sizes, place, kBins - 1, 0);
  }

  template <class F>
  void mark(int32_t n, F f, uint32_t* words) {
    for (int64_t begin = 0; begin < n; begin += 32) {
      const int64_t end = n - begin < 32 ? n : begin + 32;
      uint32_t word = 0;
      for (int64_t i = begin; i < end; ++i) {
        word |= static_cast<uint32_t>(f(static_cast<int32_t>(i))) << (i - begin);
      }
      words[begin / 32] = word;
    }
  }

  void add_bits(uint32_t* word, uint32_t bits) const { *word |= bits; }
};

}  // namespace rhythm_kernels::cpu
