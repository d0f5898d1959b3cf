// Stands for the CUDA header of this name, so that the kernels of csrc/cuda run on a CPU: each thread of a block is a
// fiber that runs up to its next barrier, shuffle or vote. What those need to hold is checked: that the block's threads
// meet at the same barrier, and a warp's lanes at the same shuffle.
#pragma once

#include <cstdint>

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__

struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, blockDim;

namespace emulation {

enum Exchange { kUp, kDown, kVote };

void wait_for_block(int line);

// Waits for all 32 lanes, and returns the value of the lane so far above or below, a lane's own where there is none, or
// the bits of a vote.
uint32_t wait_for_warp(int line, unsigned lanes, Exchange exchange, uint32_t value, int distance);

}  // namespace emulation

#define __syncthreads() emulation::wait_for_block(__LINE__)
#define __shfl_up_sync(lanes, value, distance) \
  static_cast<int32_t>(emulation::wait_for_warp(__LINE__, lanes, emulation::kUp, value, distance))
#define __shfl_down_sync(lanes, value, distance) \
  static_cast<int32_t>(emulation::wait_for_warp(__LINE__, lanes, emulation::kDown, value, distance))
#define __ballot_sync(lanes, value) emulation::wait_for_warp(__LINE__, lanes, emulation::kVote, value, 0)

// No fiber runs between the two halves of one.
template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

inline uint32_t atomicOr(uint32_t* address, uint32_t bits) {
  const uint32_t before = *address;
  *address |= bits;
  return before;
}
