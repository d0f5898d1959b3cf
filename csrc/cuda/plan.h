// Chooses the number of a block's threads, and the memory for the scratch of its sequence.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../rows/sequences.h"
#include "row_kernel.cuh"

namespace rhythm_kernels::cuda {

constexpr int kFewThreads = 256;
constexpr int64_t kFewTokens = 2048;
constexpr int64_t kFewBytes = 48 << 10;  // of shared memory: four such blocks fit on an H100's SM, three on an A100's

struct Plan {
  int threads;
  int32_t capacity;  // tokens of a sequence whose scratch is in shared memory
  int64_t shared_bytes;
  int64_t workspace_words;  // for longer ones
};

// `scratch` is the number of words a token, `shared_bytes` the shared memory that a block may have.
inline Plan plan_launch(int scratch, const Sequences& sequences, int64_t shared_bytes) {
  const bool packed = sequences.cu_seqlens != nullptr;
  const int64_t row = sequences.tokens;
  const int64_t mean = packed ? row / sequences.count : row;
  const bool few = mean <= kFewTokens;
  const int64_t word = static_cast<int64_t>(sizeof(uint32_t));
  const int64_t own = static_cast<int64_t>(sizeof(BlockScratch));
  const int64_t most = std::max<int64_t>((few ? std::min(shared_bytes, kFewBytes) : shared_bytes) - own, 0);
  const int64_t fits = most / (scratch * word);
  // rows of equal length fit all or not at all
  const int64_t capacity = fits >= row ? row : packed ? fits : 0;
  const int64_t all = packed ? row : sequences.count * row;
  return {
      few ? kFewThreads : kThreads,
      static_cast<int32_t>(capacity),
      own + capacity * scratch * word,
      capacity >= row ? 0 : scratch * all};
}

}  // namespace rhythm_kernels::cuda
