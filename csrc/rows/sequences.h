// Finds the sequences of a batch: rows of equal length, or one row that cu_seqlens cuts.
#pragma once

#include <cstdint>

#include "order.h"

namespace rhythm_kernels {

struct Sequence {
  int64_t index;
  int64_t begin;  // the place of its first token in the batch
  int32_t tokens;
  bool exists;  // false where cu_seqlens is wrong; it then has no tokens
};

struct Sequences {
  int64_t count;
  int64_t tokens;             // of a row
  const int32_t* cu_seqlens;  // [count + 1] on the batch's device, or null

  // Returns whether cu_seqlens rises from 0 to the end of the row, so that sequences neither leave it nor overlap.
  template <class Team>
  RK_HOST_DEVICE bool exist(Team& team) const {
    if (cu_seqlens == nullptr) {
      return true;
    }
    const int32_t* cuts = cu_seqlens;
    const int32_t falls = team.sum(static_cast<int32_t>(count), [=](int32_t i) { return cuts[i] > cuts[i + 1]; });
    return falls == 0 && cuts[0] == 0 && cuts[count] == tokens;
  }

  RK_HOST_DEVICE Sequence at(int64_t index, bool exists) const {
    if (!exists) {
      return {index, 0, 0, false};
    }
    if (cu_seqlens == nullptr) {
      return {index, index * tokens, static_cast<int32_t>(tokens), true};
    }
    return {index, cu_seqlens[index], cu_seqlens[index + 1] - cu_seqlens[index], true};
  }
};

}  // namespace rhythm_kernels
