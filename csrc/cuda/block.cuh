// A team that is a thread block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../rows/select.h"

namespace rhythm_kernels::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct BlockScratch {
  int32_t sizes[kBins];
  Bin bin;
  int32_t total;
};

// The whole block calls every member but add_bits. It has one warp or more, and no part of one.
class Block {
 public:
  __device__ explicit Block(BlockScratch& scratch) : scratch_(scratch) {}

  template <class F>
  __device__ __forceinline__ void for_each(int32_t n, F f) {
    for (uint32_t i = threadIdx.x; i < static_cast<uint32_t>(n); i += blockDim.x) {
      f(static_cast<int32_t>(i));
    }
    __syncthreads();
  }

  template <class F>
  __device__ __forceinline__ int32_t sum(int32_t n, F f) {
    if (threadIdx.x == 0) {
      scratch_.total = 0;
    }
    int32_t mine = 0;
    for (uint32_t i = threadIdx.x; i < static_cast<uint32_t>(n); i += blockDim.x) {
      mine += f(static_cast<int32_t>(i));
    }
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      mine += __shfl_down_sync(kAllLanes, mine, offset);
    }
    __syncthreads();
    if (threadIdx.x % kWarpSize == 0) {
      atomicAdd(&scratch_.total, mine);
    }
    __syncthreads();
    const int32_t total = scratch_.total;
    __syncthreads();  // before the next sum starts anew
    return total;
  }

  // The counts are integers, so they do not depend on the order of the atomics.
  template <class F>
  __device__ __forceinline__ Bin find_bin(int32_t n, F bin_of, int32_t place) {
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
      scratch_.sizes[bin] = 0;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < static_cast<uint32_t>(n); i += blockDim.x) {
      const int32_t bin = bin_of(static_cast<int32_t>(i));
      if (bin != kNoBin) {
        atomicAdd(&scratch_.sizes[bin], 1);
      }
    }
    __syncthreads();
    if (threadIdx.x < kWarpSize) {
      walk_by_warp(place);
    }
    __syncthreads();
    return scratch_.bin;
  }

  template <class F>
  __device__ __forceinline__ void mark(int32_t n, F f, uint32_t* words) {
    const uint32_t whole_warps = (static_cast<uint32_t>(n) + kWarpSize - 1) / kWarpSize * kWarpSize;
    for (uint32_t i = threadIdx.x; i < whole_warps; i += blockDim.x) {
      const unsigned word = __ballot_sync(kAllLanes, i < static_cast<uint32_t>(n) && f(static_cast<int32_t>(i)));
      if (threadIdx.x % kWarpSize == 0) {
        words[i / kWarpSize] = word;
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void add_bits(uint32_t* word, uint32_t bits) const { atomicOr(word, bits); }

 private:
  // Each lane of the first warp sums its share of the bins, the first lane that of the highest. The lane whose share
  // has the place walks its bins one by one.
  __device__ __forceinline__ void walk_by_warp(int32_t place) {
    constexpr int kBinsPerLane = kBins / kWarpSize;
    const int lane = threadIdx.x;
    const int high = kBins - 1 - lane * kBinsPerLane;
    int32_t mine = 0;
    for (int bin = high; bin > high - kBinsPerLane; --bin) {
      mine += scratch_.sizes[bin];
    }
    int32_t up_to_mine = mine;
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, up_to_mine, offset);
      up_to_mine += lane >= offset ? other : 0;
    }
    const int32_t above = up_to_mine - mine;
    if (above < place && place <= up_to_mine) {
      scratch_.bin = walk_bins(scratch_.sizes, place - above, high, high - kBinsPerLane + 1);
    }
  }

  BlockScratch& scratch_;
};

}  // namespace rhythm_kernels::cuda
