// The kernel that runs a row of csrc/rows/: a block for each sequence of a batch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../rows/sequences.h"
#include "block.cuh"

namespace rhythm_kernels::cuda {

constexpr int kThreads = 1024;  // at most

// The sequence's scratch is in shared memory, behind the block's own, if it has at most `capacity` tokens; else in its
// part of `workspace`.
template <class Row>
__global__ void __launch_bounds__(kThreads, 1) row_kernel(
    const __grid_constant__ Row row, const Sequences sequences, const int32_t capacity, uint32_t* workspace) {
  extern __shared__ uint32_t shared[];
  Block team(*reinterpret_cast<BlockScratch*>(shared));
  const Sequence sequence = sequences.at(blockIdx.x, sequences.exist(team));
  if (sequence.tokens <= capacity) {
    row(team, sequence, shared + sizeof(BlockScratch) / sizeof(uint32_t));
  } else {
    row(team, sequence, workspace + Row::kScratch * sequence.begin);
  }
}

}  // namespace rhythm_kernels::cuda
