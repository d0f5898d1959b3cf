// Selects the largest of a sequence, by radix search for the last one that is taken.
//
// A team does the work: one thread (cpu::Solo) or a thread block (cuda::Block). It shares n items among its threads in
// any order:
//
//   for_each(n, f)               calls f(i) for every item
//   sum(n, f)                    returns the sum of f(i), an int32
//   find_bin(n, bin_of, place)   puts the items in bins (kNoBin: in none), and returns the bin of the place-th item,
//                                place >= 1, counted from the highest bin
//   mark(n, f, words)            sets bit i % 32 of words[i / 32] to f(i)
//   add_bits(word, bits)         does word |= bits, also when several threads do it at once
//
// Each of the first four begins after the one before it has ended for all threads, and returns the same to each of
// them. Within one, no thread reads a word that another writes. So results do not depend on the team.
#pragma once

#include <cstdint>

#include "order.h"

namespace rhythm_kernels {

constexpr int kDigitBits = 8;
constexpr int kDigits = 32 / kDigitBits;
constexpr int kBins = 1 << kDigitBits;
constexpr int kNoBin = -1;

struct Bin {
  int32_t index;
  int32_t place;  // within the bin, from 1
  int32_t size;
};

// Walks down bins high..low to the place-th item. Needs 1 <= place <= the sum of these bins.
RK_HOST_DEVICE Bin walk_bins(const int32_t* sizes, int32_t place, int high, int low) {
  int bin = high;
  while (bin > low && place > sizes[bin]) {
    place -= sizes[bin];
    --bin;
  }
  return {bin, place, sizes[bin]};
}

RK_HOST_DEVICE int32_t digit_at(uint32_t number, int shift) {
  return static_cast<int32_t>((number >> shift) & (kBins - 1));
}

// In two steps, since a shift by 32 is undefined.
RK_HOST_DEVICE uint32_t digits_above(uint32_t number, int shift) { return number >> shift >> kDigitBits; }

// A search for the place-th largest rank, of which some digits are known, the highest first.
struct Search {
  uint32_t digits;
  int shift;        // the last known digit's; 0: the whole rank is known
  int32_t place;    // among the ranks that begin with these digits
  int32_t sharing;  // how many ranks begin with them
};

// rank_at(i) is kOutside for an item that takes no part. With `as_set` the search ends as soon as all ranks that begin
// with the known digits are taken, which is enough to select. Needs 1 <= place <= the number of items that take part.
template <class Team, class RankAt>
RK_HOST_DEVICE Search search_ranks(Team& team, int32_t n, int32_t place, RankAt rank_at, bool as_set) {
  Search search{0, kDigits * kDigitBits, place, 0};
  do {
    const int shift = search.shift - kDigitBits;
    const uint32_t known = search.digits;
    const Bin bin = team.find_bin(
        n,
        [=](int32_t i) {
          const uint32_t rank = rank_at(i);
          return rank != kOutside && digits_above(rank, shift) == known ? digit_at(rank, shift) : kNoBin;
        },
        search.place);
    search = {known << kDigitBits | static_cast<uint32_t>(bin.index), shift, bin.place, bin.size};
  } while (search.shift > 0 && !(as_set && search.place == search.sharing));
  return search;
}

// Takes higher ranks, and equal ones before position ties_end.
struct Threshold {
  uint32_t rank;
  int32_t ties_end;

  RK_HOST_DEVICE bool takes(uint32_t other, int32_t t) const { return other > rank || (other == rank && t < ties_end); }
};

// Returns the position after the place-th item that has this rank, by position.
template <class Team, class RankAt>
RK_HOST_DEVICE int32_t find_ties_end(Team& team, int32_t n, int32_t place, uint32_t rank, RankAt rank_at) {
  int shift = 0;
  while (digits_above(static_cast<uint32_t>(n - 1), shift) != 0) {
    shift += kDigitBits;
  }
  uint32_t known = 0;
  for (;; shift -= kDigitBits) {
    const Bin bin = team.find_bin(
        n,
        [=](int32_t i) {
          const uint32_t t = static_cast<uint32_t>(i);
          const bool tie = rank_at(i) == rank && digits_above(t, shift) == known;
          return tie ? kBins - 1 - digit_at(t, shift) : kNoBin;  // low positions in high bins
        },
        place);
    known = known << kDigitBits | static_cast<uint32_t>(kBins - 1 - bin.index);
    place = bin.place;
    if (shift == 0) {
      return static_cast<int32_t>(known) + 1;
    }
  }
}

// Returns the threshold that takes `count` items: higher ranks before lower ones, then lower positions, and never NaN.
template <class Team, class RankAt>
RK_HOST_DEVICE Threshold select(Team& team, int32_t n, int32_t count, RankAt rank_at) {
  if (count == 0) {
    return {0xffffffffu, 0};  // no rank is this high
  }
  const Search search = search_ranks(team, n, count, rank_at, /*as_set=*/true);
  const uint32_t lowest = search.digits << search.shift;
  if (lowest <= kNaN) {  // all numbers are taken
    return {kNaN + 1, n};
  }
  if (search.place == search.sharing) {
    return {lowest, n};
  }
  return {lowest, find_ties_end(team, n, search.place, lowest, rank_at)};
}

}  // namespace rhythm_kernels
