// Runs a row of csrc/rows/ on every sequence of a batch, with one thread for a sequence.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "../ops/checks.h"
#include "../rows/sequences.h"
#include "solo.h"

namespace rhythm_kernels::cpu {

struct Device {
  template <class Row>
  static void run(const char* op, const Row& row, const Sequences& sequences, const Tensor&) {
    Solo looking;
    check(sequences.exist(looking), op, ": cu_seqlens must rise from 0 to T = ", sequences.tokens);
    constexpr int64_t kTokensPerThread = 16384;  // enough work to start a thread for
    const int64_t all = sequences.cu_seqlens == nullptr ? sequences.count * sequences.tokens : sequences.tokens;
    const int64_t mean = all / (sequences.count > 0 ? sequences.count : 1);
    const int64_t grain = mean >= kTokensPerThread ? 1 : kTokensPerThread / (mean > 0 ? mean : 1);
    torch::stable::parallel_for(0, sequences.count, grain, [&](int64_t begin, int64_t end) {
      std::vector<uint32_t> scratch;
      Solo team;
      for (int64_t index = begin; index < end; ++index) {
        const Sequence sequence = sequences.at(index, /*exists=*/true);
        scratch.resize(static_cast<size_t>(Row::kScratch) * sequence.tokens);
        row(team, sequence, scratch.data());
      }
    });
  }
};

}  // namespace rhythm_kernels::cpu
