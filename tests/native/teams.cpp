// Runs every row of csrc/rows with teams of threads that wait for each other where csrc/cuda/block.cuh does, and
// compares every output byte with one thread's. ThreadSanitizer watches: a data race of a thread block is one here.
//
//   teams [BARRIER]    leaves out the barrier of this number, which has to be noticed
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iterator>
#include <random>
#include <thread>
#include <vector>

#include "cpu/solo.h"
#include "rows/credit.h"
#include "rows/peaks.h"
#include "rows/topq.h"

namespace rhythm_kernels {
namespace {

constexpr uint32_t kSeed = 1;
constexpr int kCases = 450;
constexpr int kTeamSizes[] = {1, 3, 8};
constexpr uint8_t kUnwritten = 0xbe;

// Every __syncthreads of cuda::Block.
enum Barrier {
  kNone,
  kForEachEnds,
  kTotalIs0,
  kTotalIsSum,
  kTotalIsRead,
  kBinsAre0,
  kBinsAreFull,
  kBinIsFound,
  kMarkEnds
};

int left_out = kNone;

enum Order { kForwards, kBackwards, kInChunks, kOrders };

// ---- a team of threads

// The last to arrive wakes the others, which sleep since they are more than the cores. Not with a mutex or the standard
// library's waiting: these also order a thread that wakes up late behind what the others have done since, and
// ThreadSanitizer would miss its races with them.
class Meeting {
 public:
  explicit Meeting(int threads) : threads_(threads) {}

  void wait() {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      futex(FUTEX_WAKE_PRIVATE, INT_MAX);
    } else {
      while (round_.load(std::memory_order_acquire) == round) {
        futex(FUTEX_WAIT_PRIVATE, round);
      }
    }
  }

 private:
  void futex(int operation, uint32_t value) { syscall(SYS_futex, &round_, operation, value, nullptr, nullptr, 0); }

  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> round_{0};
};

// What a thread block has in shared memory.
struct TeamScratch {
  explicit TeamScratch(int threads) : meeting(threads) {}

  Meeting meeting;
  int32_t sizes[kBins];
  Bin bin;
  int32_t total;
};

class ThreadTeam {
 public:
  ThreadTeam(TeamScratch& scratch, int thread, int threads, Order order)
      : scratch_(scratch), thread_(thread), threads_(threads), order_(order) {}

  template <class F>
  void for_each(int32_t n, F f) {
    share(n, f);
    wait(kForEachEnds);
  }

  template <class F>
  int32_t sum(int32_t n, F f) {
    if (thread_ == 0) {
      scratch_.total = 0;
    }
    int32_t mine = 0;
    share(n, [&](int32_t i) { mine += f(i); });
    wait(kTotalIs0);
    __atomic_fetch_add(&scratch_.total, mine, __ATOMIC_RELAXED);
    wait(kTotalIsSum);
    const int32_t total = scratch_.total;
    wait(kTotalIsRead);
    return total;
  }

  template <class F>
  Bin find_bin(int32_t n, F bin_of, int32_t place) {
    for (int bin = thread_; bin < kBins; bin += threads_) {
      scratch_.sizes[bin] = 0;
    }
    wait(kBinsAre0);
    share(n, [&](int32_t i) {
      const int32_t bin = bin_of(i);
      if (bin != kNoBin) {
        __atomic_fetch_add(&scratch_.sizes[bin], 1, __ATOMIC_RELAXED);
      }
    });
    wait(kBinsAreFull);
    if (thread_ == 0) {
      scratch_.bin = walk_bins(scratch_.sizes, place, kBins - 1, 0);
    }
    wait(kBinIsFound);
    return scratch_.bin;
  }

  template <class F>
  void mark(int32_t n, F f, uint32_t* words) {
    share((n + 31) / 32, [&](int32_t word) {
      uint32_t bits = 0;
      for (int32_t i = word * 32; i < n && i < word * 32 + 32; ++i) {
        bits |= static_cast<uint32_t>(f(i)) << (i % 32);
      }
      words[word] = bits;
    });
    wait(kMarkEnds);
  }

  void add_bits(uint32_t* word, uint32_t bits) const { __atomic_fetch_or(word, bits, __ATOMIC_RELAXED); }

 private:
  template <class F>
  void share(int32_t n, F f) const {
    if (order_ == kInChunks) {
      const int32_t size = (n + threads_ - 1) / threads_;
      for (int32_t i = thread_ * size; i < n && i < (thread_ + 1) * size; ++i) {
        f(i);
      }
      return;
    }
    for (int32_t i = thread_; i < n; i += threads_) {
      f(order_ == kBackwards ? n - 1 - i : i);
    }
  }

  void wait(Barrier barrier) {
    if (barrier != left_out) {
      scratch_.meeting.wait();
    }
  }

  TeamScratch& scratch_;
  const int thread_;
  const int threads_;
  const Order order_;
};

// As csrc/cuda/run.cuh launches it: all sequences at once, a team each.
template <class Row>
void run_teams(const Row& row, const Sequences& sequences, int threads, Order order, uint32_t* workspace) {
  std::deque<TeamScratch> scratch;
  std::vector<std::thread> running;
  for (int64_t index = 0; index < sequences.count; ++index) {
    TeamScratch& shared = scratch.emplace_back(threads);
    for (int thread = 0; thread < threads; ++thread) {
      running.emplace_back([=, &row, &sequences, &shared] {
        ThreadTeam team(shared, thread, threads, order);
        const Sequence sequence = sequences.at(index, sequences.exist(team));
        row(team, sequence, workspace + Row::kScratch * sequence.begin);
      });
    }
  }
  for (std::thread& thread : running) {
    thread.join();
  }
}

template <class Row>
void run_alone(const Row& row, const Sequences& sequences, uint32_t* workspace) {
  cpu::Solo team;
  for (int64_t index = 0; index < sequences.count; ++index) {
    row(team, sequences.at(index, sequences.exist(team)), workspace);
  }
}

// ---- cases

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
  std::vector<uint8_t> mask;
  std::vector<int32_t> cuts;  // empty: rows of equal length
  int64_t count, tokens;
  double q;
  int32_t k;
  bool largest, of_delta, with_sets;
  uint32_t low, high;

  Sequences sequences() const { return {count, tokens, cuts.empty() ? nullptr : cuts.data()}; }
};

std::vector<float> draw_signal(Random& random, int64_t size, bool finite) {
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

int32_t draw_length(Random& random) {
  if (random.once_in(24)) {
    return 2000 + random.below(3000);
  }
  return random.once_in(2) ? random.one_of({0, 1, 2, 3, 31, 32, 33, 64, 255, 256, 257}) : random.below(301);
}

// Sequences of several lengths, some empty; now and then a place that cannot be.
std::vector<int32_t> draw_cuts(Random& random, int32_t tokens) {
  std::vector<int32_t> cuts{0};
  for (int parts = random.below(4); parts > 0; --parts) {
    cuts.push_back(cuts.back() + random.below(tokens - cuts.back() + 1));
  }
  cuts.push_back(tokens);
  if (random.once_in(8)) {
    cuts[random.below(static_cast<int32_t>(cuts.size()))] = random.one_of({-1, 1, tokens / 2, tokens + 1});
  }
  return cuts;
}

Inputs draw_inputs(Random& random) {
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
    inputs.mask.push_back(random.below(100) < density);
  }
  inputs.q = random.one_of({0.0, 0.2, 0.4, 0.4, 0.9, 1.0});
  inputs.k = random.one_of({1, 3, 8, 1000});
  inputs.largest = random.once_in(2);
  inputs.of_delta = random.once_in(2);
  inputs.with_sets = random.once_in(2);
  inputs.low = random.once_in(2) ? kOutside : rank_of(key_of(1.0f), /*largest=*/false);
  inputs.high = random.once_in(2) ? kOutside : key_of(0.5f);
  return inputs;
}

// ---- rows

struct Outputs {
  std::vector<uint8_t> bytes, of_sequences;
  std::vector<float> factors;
  std::vector<int32_t> steps;

  explicit Outputs(const Inputs& inputs)
      : bytes(inputs.mask.size()), of_sequences(inputs.count), factors(inputs.mask.size()), steps(inputs.mask.size()) {
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

TopQ topq(const Inputs& in, Outputs& out) {
  return {in.first.data(), in.mask.data(), out.bytes.data(), out.of_sequences.data(), in.q, in.largest};
}

Peaks peaks(const Inputs& in, Outputs& out) { return {in.first.data(), in.mask.data(), out.bytes.data(), in.q}; }

TopQCredit topq_credit(const Inputs& in, Outputs& out) {
  return {
      in.first.data(),
      in.mask.data(),
      out.factors.data(),
      out.of_sequences.data(),
      in.q,
      1.5f,
      in.of_delta,
      in.largest};
}

CoupledCredit coupled_credit(const Inputs& in, Outputs& out) {
  return {
      in.first.data(),
      in.second.data(),
      in.mask.data(),
      out.factors.data(),
      out.of_sequences.data(),
      in.with_sets ? out.bytes.data() : nullptr,
      in.with_sets ? out.steps.data() : nullptr,
      in.q,
      in.k,
      in.largest,
      in.low,
      in.high,
      {1, 2, 3, 4, 5, 6, 7, 8}};
}

template <class Row>
void check(const char* name, Row (*make)(const Inputs&, Outputs&), const Inputs& inputs, int number) {
  const int threads = kTeamSizes[number % std::size(kTeamSizes)];
  const Order order = static_cast<Order>(number / std::size(kTeamSizes) % kOrders);
  Outputs expected(inputs), found(inputs);
  std::vector<uint32_t> workspace(Row::kScratch * inputs.mask.size());
  run_alone(make(inputs, expected), inputs.sequences(), workspace.data());
  std::fill(workspace.begin(), workspace.end(), 0xffffffffu);  // nobody may depend on what is there
  run_teams(make(inputs, found), inputs.sequences(), threads, order, workspace.data());
  if (found.all() != expected.all()) {
    std::printf("%s, case %d: a team of %d threads, order %d, has other results\n", name, number, threads, order);
    std::exit(1);
  }
}

void check_all() {
  Random random(kSeed);
  for (int number = 0; number < kCases; ++number) {
    const Inputs inputs = draw_inputs(random);
    check("topq", topq, inputs, number);
    check("peaks", peaks, inputs, number);
    check("topq_credit", topq_credit, inputs, number);
    check("coupled_credit", coupled_credit, inputs, number);
  }
}

}  // namespace
}  // namespace rhythm_kernels

int main(int argc, char** argv) {
  if (argc > 1) {
    rhythm_kernels::left_out = std::atoi(argv[1]);
  }
  rhythm_kernels::check_all();
  std::puts("every team has the same results");
}
