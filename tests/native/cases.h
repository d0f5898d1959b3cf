// Random batches, and what one thread makes of them: what every other way to run the rows is compared with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/solo.h"
#include "rows/credit.h"
#include "rows/peaks.h"
#include "rows/topq.h"

namespace rhythm_kernels {

constexpr uint32_t kSeed = 1;
constexpr uint8_t kUnwritten = 0xbe;

template <class Row>
void run_alone(const Row& row, const Sequences& sequences, uint32_t* workspace) {
  cpu::Solo team;
  for (int64_t index = 0; index < sequences.count; ++index) {
    row(team, sequences.at(index, sequences.exist(team)), workspace);
  }
}

class Random {
 public:
  explicit Random(uint32_t seed) : bits_(seed) {}

  uint32_t bits() { return static_cast<uint32_t>(bits_()); }
  int32_t below(int32_t n) { return static_cast<int32_t>(bits() % static_cast<uint32_t>(n)); }
  bool once_in(int32_t n) { return below(n) == 0; }

  template <class T, size_t n>
  T one_of(const T (&choices)[n]) {
    return choices[below(n)];
  }

 private:
  std::mt19937 bits_;
};

struct Inputs {
  std::vector<float> first, second;
  std::vector<uint8_t> response_mask;
  std::vector<int32_t> cuts;  // empty: rows of equal length
  int64_t count, tokens;
  double top_fraction, preplan_fraction;
  int32_t max_lookback;
  bool largest, of_delta, drops, with_sets;
  uint32_t low, high;

  Sequences sequences() const { return {count, tokens, cuts.empty() ? nullptr : cuts.data()}; }
};

inline std::vector<float> draw_signal(Random& random, int64_t size, bool finite) {
  const int kind = random.below(4);
  const float level = static_cast<float>(random.below(3));
  std::vector<float> values(size);
  for (float& value : values) {
    switch (kind) {
      case 0:  // any
        value = float_of(random.bits());
        break;
      case 1:  // many ties
        value = random.one_of({0.0f, -0.0f, 1.0f, -1.0f, 1e-45f, 2.5f});
        break;
      case 2:  // few
        value = static_cast<float>(random.below(1 << 20)) / 1024;
        break;
      default:  // all equal
        value = level;
    }
    if (finite && !is_finite(key_of(value))) {
      value = 0.5f;
    }
  }
  return values;
}

inline int32_t draw_length(Random& random) {
  if (random.once_in(24)) {
    return 2000 + random.below(3000);
  }
  return random.once_in(2) ? random.one_of({0, 1, 2, 3, 31, 32, 33, 64, 255, 256, 257}) : random.below(301);
}

// Sequences of several lengths, some empty; now and then a place that cannot be. Some are a token longer than what has
// its scratch in the shared memory of kernels.cpp.
inline std::vector<int32_t> draw_cuts(Random& random, int32_t tokens) {
  std::vector<int32_t> cuts{0};
  for (int parts = random.below(4); parts > 0; --parts) {
    const int32_t rest = tokens - cuts.back();
    const int32_t edge = random.one_of({85, 127, 253, 255, 383});
    cuts.push_back(cuts.back() + (random.once_in(2) ? std::min(edge, rest) : random.below(rest + 1)));
  }
  cuts.push_back(tokens);
  if (random.once_in(8)) {
    cuts[random.below(static_cast<int32_t>(cuts.size()))] = random.one_of({-1, 1, tokens / 2, tokens + 1});
  }
  return cuts;
}

inline Inputs draw_inputs(Random& random) {
  Inputs inputs;
  inputs.tokens = draw_length(random);
  inputs.count = 1 + random.below(3);
  if (random.once_in(2)) {
    inputs.cuts = draw_cuts(random, static_cast<int32_t>(inputs.tokens));
    inputs.count = static_cast<int64_t>(inputs.cuts.size()) - 1;
  }
  const int64_t size = inputs.cuts.empty() ? inputs.count * inputs.tokens : inputs.tokens;
  const bool finite = !random.once_in(4);  // without it there is no credit
  inputs.first = draw_signal(random, size, finite);
  inputs.second = draw_signal(random, size, finite);
  const int density = random.one_of({0, 50, 90, 90, 100, 100});
  for (int64_t t = 0; t < size; ++t) {
    inputs.response_mask.push_back(random.below(100) < density);
  }
  inputs.top_fraction = random.one_of({0.0, 0.2, 0.4, 0.4, 0.9, 1.0});
  inputs.max_lookback = random.one_of({1, 3, 8, 1000});
  inputs.largest = random.once_in(2);
  inputs.preplan_fraction = random.one_of({0.0, 0.3, 0.4, 0.8, 1.0});
  inputs.of_delta = random.once_in(2);
  inputs.drops = random.once_in(2);
  inputs.with_sets = random.once_in(2);
  inputs.low = random.once_in(2) ? kOutside : rank_of(key_of(1.0f), /*largest=*/false);
  inputs.high = random.once_in(2) ? kOutside : key_of(0.5f);
  return inputs;
}

struct Outputs {
  std::vector<uint8_t> bytes, of_sequences;
  std::vector<float> factors;
  std::vector<int32_t> steps;

  explicit Outputs(const Inputs& inputs)
      : bytes(inputs.response_mask.size()),
        of_sequences(inputs.count),
        factors(inputs.response_mask.size()),
        steps(inputs.response_mask.size()) {
    for_all([](void* data, size_t size) {
      if (size > 0) {
        std::memset(data, kUnwritten, size);
      }
    });
  }

  template <class F>
  void for_all(F f) {
    f(bytes.data(), bytes.size());
    f(of_sequences.data(), of_sequences.size());
    f(factors.data(), factors.size() * sizeof(float));
    f(steps.data(), steps.size() * sizeof(int32_t));
  }

  std::vector<uint8_t> all() {
    std::vector<uint8_t> joined;
    for_all([&](const void* data, size_t size) {
      const auto* begin = static_cast<const uint8_t*>(data);
      joined.insert(joined.end(), begin, begin + size);
    });
    return joined;
  }
};

inline TopQ topq(const Inputs& in, Outputs& out) {
  return {
      in.first.data(), in.response_mask.data(), out.bytes.data(), out.of_sequences.data(), in.top_fraction, in.largest};
}

inline Peaks peaks(const Inputs& in, Outputs& out) {
  return {in.first.data(), in.response_mask.data(), out.bytes.data(), in.top_fraction};
}

inline TopQCredit topq_credit(const Inputs& in, Outputs& out) {
  return {
      in.first.data(),
      in.response_mask.data(),
      out.factors.data(),
      out.of_sequences.data(),
      in.top_fraction,
      1.5f,
      in.of_delta,
      in.drops,
      in.largest};
}

inline CoupledCredit coupled_credit(const Inputs& in, Outputs& out) {
  return {
      in.first.data(),
      in.second.data(),
      in.response_mask.data(),
      out.factors.data(),
      out.of_sequences.data(),
      in.with_sets ? out.bytes.data() : nullptr,
      in.with_sets ? out.steps.data() : nullptr,
      in.top_fraction,
      in.preplan_fraction,
      in.max_lookback,
      in.largest,
      in.drops,
      in.low,
      in.high,
      {1, 2, 3, 4, 5, 6, 7, 8}};
}

// Runs a row of every kind on `count` batches with `run(row, sequences, workspace, number)`, and ends the program where
// a byte of the results is another than one thread's.
template <class Run>
class Comparison {
 public:
  Comparison(Run run, int count) : run_(run) {
    Random random(kSeed);
    for (int number = 0; number < count; ++number) {
      const Inputs inputs = draw_inputs(random);
      check("topq", topq, inputs, number);
      check("peaks", peaks, inputs, number);
      check("topq_credit", topq_credit, inputs, number);
      check("coupled_credit", coupled_credit, inputs, number);
    }
  }

 private:
  template <class Row>
  void check(const char* name, Row (*make)(const Inputs&, Outputs&), const Inputs& inputs, int number) {
    Outputs expected(inputs), found(inputs);
    std::vector<uint32_t> workspace(Row::kScratch * inputs.response_mask.size());
    run_alone(make(inputs, expected), inputs.sequences(), workspace.data());
    std::fill(workspace.begin(), workspace.end(), 0xffffffffu);  // nobody may depend on what is there
    run_(make(inputs, found), inputs.sequences(), workspace.data(), number);
    if (found.all() != expected.all()) {
      std::printf("%s, case %d: other results than one thread's\n", name, number);
      std::exit(1);
    }
  }

  Run run_;
};

}  // namespace rhythm_kernels
