// The last key taken of one row, by one thread block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../select.h"

namespace rhythm_kernels::cuda {

constexpr int kWarpSize = 32;
constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr unsigned kAllLanes = 0xffffffffu;

struct SelectScratch {
  int32_t histogram[kBins];
  RadixSearch search;
};

__device__ __forceinline__ uint32_t key_at(const float* values, const uint8_t* mask, int64_t t) {
  return mask[t] ? order_key(values[t]) : kNoKey;
}

// One digit of the search, by the first warp: each lane sums its share of the bins, highest bins first, and the lane
// that the searched key falls to looks at its bins one by one. In the first step `remaining` follows from the count.
__device__ __forceinline__ void descend_by_warp(SelectScratch& scratch, int step, double fraction) {
  constexpr int kBinsPerLane = kBins / kWarpSize;
  const int lane = threadIdx.x;
  const int high = kBins - 1 - lane * kBinsPerLane;
  int32_t mine = 0;
  for (int bin = high; bin > high - kBinsPerLane; --bin) {
    mine += scratch.histogram[bin];
  }
  int32_t up_to_mine = mine;
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, up_to_mine, offset);
    up_to_mine += lane >= offset ? other : 0;
  }
  const int32_t all = __shfl_sync(kAllLanes, up_to_mine, kWarpSize - 1);
  const int32_t remaining = step == 0 ? selection_count(fraction, all) : scratch.search.remaining;
  __syncwarp();  // every lane has read the search before one of them changes it
  const int32_t above = up_to_mine - mine;
  if (remaining == 0) {
    if (lane == 0) {
      scratch.search.remaining = 0;
    }
  } else if (above < remaining && remaining <= up_to_mine) {
    const uint32_t prefix = step == 0 ? 0 : scratch.search.prefix;
    scratch.search = descend(scratch.histogram, prefix, remaining - above, high, high - kBinsPerLane + 1);
  }
}

// Threshold of the ceil(fraction n) largest (or smallest) of the n masked values, in rank keys; the same in every
// thread. To be called by the whole block. Reads the row once for each digit.
__device__ __forceinline__ Threshold select_threshold(
    const float* values, const uint8_t* mask, int32_t tokens, double fraction, bool largest, SelectScratch& scratch) {
  for (int step = 0; step < kDigits; ++step) {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
      scratch.histogram[bin] = 0;
    }
    __syncthreads();
    const uint32_t prefix = step == 0 ? 0 : scratch.search.prefix;
    for (int64_t t = threadIdx.x; t < tokens; t += kThreads) {
      if (mask[t]) {
        const uint32_t key = rank_key(order_key(values[t]), largest);
        if (starts_with(key, prefix, step)) {
          atomicAdd(&scratch.histogram[digit_of(key, step)], 1);
        }
      }
    }
    __syncthreads();
    if (threadIdx.x < kWarpSize) {
      descend_by_warp(scratch, step, fraction);
    }
    __syncthreads();
    if (scratch.search.remaining == 0) {
      return take_nothing();
    }
  }
  return to_threshold(scratch.search);
}

}  // namespace rhythm_kernels::cuda
