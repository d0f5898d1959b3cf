// Runs every row of csrc/rows with teams of threads that wait for each other where csrc/cuda/block.cuh does, and
// compares every output byte with one thread's. ThreadSanitizer watches: a data race of a thread block is one here.
//
//   teams [BARRIER]    leaves out the barrier of this number, which has to be noticed
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <iterator>
#include <thread>
#include <vector>

#include "cases.h"

namespace rhythm_kernels {
namespace {

constexpr int kCases = 450;
constexpr int kTeamSizes[] = {1, 3, 8};

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

// The shared memory of a thread block.
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

// Launches a row like csrc/cuda/run.cuh: all sequences at once, a team each.
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

void check_all() {
  const auto run = [](const auto& row, const Sequences& sequences, uint32_t* workspace, int number) {
    const int threads = kTeamSizes[number % std::size(kTeamSizes)];
    const Order order = static_cast<Order>(number / std::size(kTeamSizes) % kOrders);
    run_teams(row, sequences, threads, order, workspace);
  };
  Comparison comparison(run, kCases);
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
