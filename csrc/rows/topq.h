// segment_topq of one sequence.
#pragma once

#include <cstdint>

#include "select.h"
#include "sequences.h"

namespace rhythm_kernels {

struct TopQ {
  static constexpr int kScratch = 1;  // words a token

  const float* values;
  const uint8_t* response_mask;
  uint8_t* selected;
  uint8_t* has_nan;  // of each sequence; also set where cu_seqlens is wrong
  double top_fraction;
  bool largest;

  template <class Team>
  RK_HOST_DEVICE void operator()(Team& team, const Sequence& sequence, uint32_t* ranks) const {
    const int32_t tokens = sequence.tokens;
    const float* row_values = values + sequence.begin;
    const uint8_t* in_response = response_mask + sequence.begin;
    uint8_t* row_selected = selected + sequence.begin;
    uint8_t* row_has_nan = has_nan + sequence.index;
    const bool take_largest = largest;
    const int32_t n = team.sum(tokens, [=](int32_t t) {
      ranks[t] = rank_of(key_at(row_values, in_response, t), take_largest);
      return in_response[t] != 0;
    });
    const int32_t numbers = team.sum(tokens, [=](int32_t t) { return is_number(ranks[t]); });
    const Threshold taken = select(team, tokens, selection_count(top_fraction, n), [=](int32_t t) { return ranks[t]; });
    team.for_each(tokens, [=](int32_t t) { row_selected[t] = taken.takes(ranks[t], t); });
    team.for_each(1, [=](int32_t) { *row_has_nan = numbers != n || !sequence.exists; });
  }
};

}  // namespace rhythm_kernels
