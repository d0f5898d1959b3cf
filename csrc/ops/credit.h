// The ops topq_credit and coupled_credit, for a device that runs rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "../rows/credit.h"
#include "checks.h"

namespace rhythm_kernels {

// Returns 1 + (amplification - 1) share, computed in fp64 and rounded once, as in Python.
inline float factor_of(double amplification, double share) {
  const double raised = (amplification - 1.0) * share;
  return static_cast<float>(1.0 + raised);
}

// Returns `tau`, or the fp32 number next to it on the side of `towards`: an fp32 number compares with both alike.
inline float round_towards(double tau, double towards) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  constexpr float kInfinite = std::numeric_limits<float>::infinity();
  if (std::fabs(tau) > kLargest) {
    const bool outwards = (tau > 0) == (towards > 0);
    return std::copysign(outwards ? kInfinite : kLargest, static_cast<float>(tau > 0 ? 1 : -1));
  }
  const float nearest = static_cast<float>(tau);
  const bool passed = towards > 0 ? nearest < tau : nearest > tau;
  return passed ? std::nextafter(nearest, std::copysign(kInfinite, static_cast<float>(towards))) : nearest;
}

template <class Device>
std::tuple<Tensor, Tensor> topq_credit(
    const Tensor& values,
    const Tensor& response_mask,
    const std::optional<Tensor>& cu_seqlens,
    bool of_delta,
    bool drops,
    double top_fraction,
    double amplification,
    bool largest) {
  const char* op = "topq_credit";
  const Batch batch = check_batch(op, response_mask, cu_seqlens);
  const Tensor signal = check_signal(op, "values", values, batch);
  check_fraction(op, "top_fraction", top_fraction);
  check(std::isfinite(amplification), op, ": amplification must be finite, got ", amplification);
  Tensor gamma = new_like_response_mask(batch, ScalarType::Float);
  Tensor faults = new_per_sequence(batch, ScalarType::Byte);
  fill_if_packed(batch, gamma, std::nan(""));
  const TopQCredit row{
      pointer<float>(signal),
      batch.response_mask_ptr(),
      pointer<float>(gamma),
      pointer<uint8_t>(faults),
      top_fraction,
      factor_of(amplification, 1),
      of_delta,
      drops,
      largest};
  Device::run(op, row, batch.sequences, batch.response_mask);
  return {gamma, faults};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> coupled_credit(
    const Tensor& waad,
    const Tensor& fai,
    const Tensor& response_mask,
    const std::optional<Tensor>& cu_seqlens,
    double top_fraction,
    double preplan_fraction,
    double amplification,
    double shared_fraction,
    int64_t max_lookback,
    bool largest,
    bool drops,
    std::optional<double> tau_waad,
    std::optional<double> tau_delta,
    bool with_sets) {
  const char* op = "coupled_credit";
  const Batch batch = check_batch(op, response_mask, cu_seqlens);
  const Tensor waad_signal = check_signal(op, "waad", waad, batch);
  const Tensor fai_signal = check_signal(op, "fai", fai, batch);
  check_fraction(op, "top_fraction", top_fraction);
  check_fraction(op, "preplan_fraction", preplan_fraction);
  check_fraction(op, "shared_fraction", shared_fraction);
  check(std::isfinite(amplification), op, ": amplification must be finite, got ", amplification);
  check(max_lookback >= 1, op, ": max_lookback must be at least 1, got ", max_lookback);
  check(!tau_waad || std::isfinite(*tau_waad), op, ": tau_waad must be finite, got ", tau_waad.value_or(0));
  check(!tau_delta || std::isfinite(*tau_delta), op, ": tau_delta must be finite, got ", tau_delta.value_or(0));
  Tensor gamma = new_like_response_mask(batch, ScalarType::Float);
  Tensor faults = new_per_sequence(batch, ScalarType::Byte);
  Tensor sets = with_sets ? new_like_response_mask(batch, ScalarType::Byte) : new_none(batch, ScalarType::Byte);
  Tensor intros = with_sets ? new_like_response_mask(batch, ScalarType::Int) : new_none(batch, ScalarType::Int);
  fill_if_packed(batch, gamma, std::nan(""));
  if (with_sets) {  // a sequence with a fault writes none
    torch::stable::zero_(sets);
    torch::stable::zero_(intros);
  }
  CoupledCredit row{
      pointer<float>(waad_signal),
      pointer<float>(fai_signal),
      batch.response_mask_ptr(),
      pointer<float>(gamma),
      pointer<uint8_t>(faults),
      with_sets ? pointer<uint8_t>(sets) : nullptr,
      with_sets ? pointer<int32_t>(intros) : nullptr,
      top_fraction,
      preplan_fraction,
      static_cast<int32_t>(std::min<int64_t>(max_lookback, std::numeric_limits<int32_t>::max())),
      largest,
      drops,
      tau_waad ? rank_of(key_of(round_towards(*tau_waad, -1)), /*largest=*/false) : kOutside,
      tau_delta ? key_of(round_towards(*tau_delta, 1)) : kOutside,
      {}};
  for (uint32_t sets_of_t = 0; sets_of_t < kFactors; ++sets_of_t) {
    const double dominated = (1 - shared_fraction) * ((sets_of_t & kDominated) != 0);
    const double intro = shared_fraction * ((sets_of_t & kIntro) != 0);
    row.factors[sets_of_t] = factor_of(amplification, dominated + ((sets_of_t & kAlone) != 0) + intro);
  }
  Device::run(op, row, batch.sequences, batch.response_mask);
  return {gamma, faults, sets, intros};
}

}  // namespace rhythm_kernels
