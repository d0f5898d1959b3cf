// Computes the factor of each token's advantage (Eq. 13-18) for one sequence.
#pragma once

#include <cstdint>

#include "select.h"
#include "sequences.h"

namespace rhythm_kernels {

// A sequence with a fault has no credit: its factors are NaN.
enum Fault : uint32_t {
  kFirstSignal = 1,   // the first signal is not finite in R
  kSecondSignal = 2,  // the second is not
  kNoSequence = 4,    // cu_seqlens is wrong
};

// The sets that a token is in. The first three choose its factor.
enum Membership : uint32_t {
  kIntro = 1,
  kAlone = 2,      // anchors that are not locally dominated
  kDominated = 4,  // anchors that are
  kPreplan = 8,
};
constexpr int kFactors = 8;

// How Delta is made of a signal (Eq. 13).
struct DeltaKind {
  bool drops;     // x_t - x_{t+1} where that is positive, in place of |x_t - x_{t+1}|
  uint32_t none;  // the key where t + 1 is not in R, or nothing drops: of 0, or kNaN, which is never taken

  RK_HOST_DEVICE DeltaKind(bool only_drops, bool largest)
      : drops(only_drops), none(only_drops && largest ? kNaN : kZero) {}
};

RK_HOST_DEVICE uint32_t delta_key(const uint32_t* keys, int32_t t, int32_t tokens, DeltaKind kind) {
  if (keys[t] == kOutside) {
    return kOutside;
  }
  if (t + 1 == tokens || keys[t + 1] == kOutside) {
    return kind.none;
  }
  const float change = number_of(keys[t]) - number_of(keys[t + 1]);
  return kind.drops && !(change > 0) ? kind.none : bits_of(change) | kZero;  // the key of a magnitude
}

// Reads a signal's keys, and returns whether the signal is finite in R.
template <class Team>
RK_HOST_DEVICE bool load_signal(
    Team& team, const float* values, const uint8_t* response_mask, int32_t tokens, uint32_t* keys) {
  const int32_t broken = team.sum(tokens, [=](int32_t t) {
    const uint32_t key = key_at(values, response_mask, t);
    keys[t] = key;
    return key != kOutside && !is_finite(key);
  });
  return broken == 0;
}

template <class Team>
RK_HOST_DEVICE void report(
    Team& team, const Sequence& sequence, const uint32_t* keys, uint32_t fault, uint8_t* faults, float* gamma) {
  team.for_each(1, [=](int32_t) { faults[sequence.index] = static_cast<uint8_t>(fault); });
  if (fault != 0) {
    team.for_each(sequence.tokens, [=](int32_t t) { gamma[t] = keys[t] == kOutside ? 1.0f : float_of(0x7fc00000u); });
  }
}

// Amplifies TopQ of a signal or of its Delta: the strategies local, global (Eq. 14, 16), random and entropy.
struct TopQCredit {
  static constexpr int kScratch = 2;

  const float* values;
  const uint8_t* response_mask;
  float* gamma;
  uint8_t* faults;  // of each sequence
  double top_fraction;
  float amplification;
  bool of_delta;
  bool drops;  // how Delta is made
  bool largest;

  template <class Team>
  RK_HOST_DEVICE void operator()(Team& team, const Sequence& sequence, uint32_t* keys) const {
    const int32_t tokens = sequence.tokens;
    float* row_gamma = gamma + sequence.begin;
    const bool finite = load_signal(team, values + sequence.begin, response_mask + sequence.begin, tokens, keys);
    const uint32_t fault = (finite ? 0u : kFirstSignal) | (sequence.exists ? 0u : kNoSequence);
    report(team, sequence, keys, fault, faults, row_gamma);
    if (fault != 0) {
      return;
    }
    uint32_t* ranks = keys + tokens;
    const int32_t n = team.sum(tokens, [=](int32_t t) { return keys[t] != kOutside; });
    const bool delta = of_delta;
    const bool take_largest = largest;
    const DeltaKind kind(drops, largest);
    const float raised = amplification;
    team.for_each(tokens, [=](int32_t t) {
      ranks[t] = rank_of(delta ? delta_key(keys, t, tokens, kind) : keys[t], take_largest);
    });
    const Threshold taken = select(team, tokens, selection_count(top_fraction, n), [=](int32_t t) { return ranks[t]; });
    team.for_each(tokens, [=](int32_t t) { row_gamma[t] = taken.takes(ranks[t], t) ? raised : 1.0f; });
  }
};

// Amplifies anchors. Locally dominated ones share their credit with the preplan token that introduces them (Eq. 17,
// 18).
struct CoupledCredit {
  static constexpr int kScratch = 3;
  static constexpr uint32_t kNone = 0xffffffffu;

  const float* waad;
  const float* fai;
  const uint8_t* response_mask;
  float* gamma;
  uint8_t* faults;          // of each sequence
  uint8_t* sets;            // the Membership bits of each token; or null
  int32_t* intros;          // for each token how many positions before it its intro is, 0 outside D; or null
  double top_fraction;      // of the anchors
  double preplan_fraction;  // of the preplan tokens
  int32_t max_lookback;
  bool largest;
  bool drops;     // how Delta is made
  uint32_t low;   // the rank of tau_waad, smallest first; kOutside stands for the lower median
  uint32_t high;  // the key of tau_delta; kOutside stands for the smallest Delta of the preplan tokens
  float factors[kFactors];

  template <class Team>
  RK_HOST_DEVICE void operator()(Team& team, const Sequence& sequence, uint32_t* scratch) const {
    const int32_t tokens = sequence.tokens;
    const uint8_t* in_response = response_mask + sequence.begin;
    float* row_gamma = gamma + sequence.begin;
    const bool largest_fai = largest;
    const int32_t steps_back = max_lookback;
    uint32_t* waad_keys = scratch;
    uint32_t* deltas = scratch + tokens;
    uint32_t* fai_keys = deltas + tokens;

    const bool waad_finite = load_signal(team, waad + sequence.begin, in_response, tokens, waad_keys);
    const bool fai_finite = load_signal(team, fai + sequence.begin, in_response, tokens, fai_keys);
    const uint32_t fault =
        (waad_finite ? 0u : kFirstSignal) | (fai_finite ? 0u : kSecondSignal) | (sequence.exists ? 0u : kNoSequence);
    report(team, sequence, waad_keys, fault, faults, row_gamma);
    if (fault != 0) {
      return;
    }

    const int32_t n = team.sum(tokens, [=](int32_t t) { return waad_keys[t] != kOutside; });
    const DeltaKind kind(drops, /*largest=*/true);
    team.for_each(tokens, [=](int32_t t) { deltas[t] = delta_key(waad_keys, t, tokens, kind); });
    const Threshold preplan =
        select(team, tokens, selection_count(preplan_fraction, n), [=](int32_t t) { return deltas[t]; });
    const Threshold anchors = select(
        team, tokens, selection_count(top_fraction, n), [=](int32_t t) { return rank_of(fai_keys[t], largest_fai); });
    // A WAAD equal to the median is low and a Delta equal to tau_delta is high, whatever their positions are.
    const uint32_t high_delta = high == kOutside ? preplan.rank : high;
    uint32_t low_waad = low;
    if (low_waad == kOutside) {
      const int32_t half = selection_count(0.5, n);
      low_waad = select(team, tokens, half, [=](int32_t t) { return rank_of(waad_keys[t], false); }).rank;
    }

    // From here on fai_keys hold each token's sets, and waad_keys its intro. Each thread writes those of its own
    // tokens.
    team.for_each(tokens, [=](int32_t t) {
      uint32_t sets_of_t = preplan.takes(deltas[t], t) ? kPreplan : 0u;
      uint32_t intro = kNone;
      if (anchors.takes(rank_of(fai_keys[t], largest_fai), t)) {
        if (rank_of(waad_keys[t], false) >= low_waad) {
          intro = find_intro(deltas, t, steps_back, high_delta);
        }
        sets_of_t |= intro == kNone ? kAlone : kDominated;
      }
      fai_keys[t] = sets_of_t;
      waad_keys[t] = intro;
    });
    team.for_each(tokens, [=, &team](int32_t t) {
      if (waad_keys[t] != kNone) {
        team.add_bits(&fai_keys[waad_keys[t]], kIntro);
      }
    });
    const float* factor_of = factors;
    team.for_each(tokens, [=](int32_t t) { row_gamma[t] = factor_of[fai_keys[t] % kFactors]; });
    if (sets != nullptr) {
      uint8_t* row_sets = sets + sequence.begin;
      int32_t* row_intros = intros + sequence.begin;
      team.for_each(tokens, [=](int32_t t) {
        row_sets[t] = static_cast<uint8_t>(fai_keys[t]);
        row_intros[t] = waad_keys[t] == kNone ? 0 : t - static_cast<int32_t>(waad_keys[t]);
      });
    }
  }

 private:
  // Returns the position of the largest Delta among the max_lookback positions before t, the latest of equal ones;
  // kNone if that Delta does not reach `high`.
  RK_HOST_DEVICE static uint32_t find_intro(const uint32_t* deltas, int32_t t, int32_t max_lookback, uint32_t high) {
    uint32_t best = kOutside;
    int32_t intro = 0;
    RK_SHORT_LOOP  // max_lookback is small
    for (int32_t u = t - 1; u >= 0 && u >= t - max_lookback; --u) {
      if (deltas[u] > best) {
        best = deltas[u];
        intro = u;
      }
    }
    return best != kOutside && best >= high ? static_cast<uint32_t>(intro) : kNone;
  }
};

}  // namespace rhythm_kernels
