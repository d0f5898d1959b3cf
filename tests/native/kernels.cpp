// Runs the kernels of csrc/cuda themselves on a CPU, with blocks of several sizes whose threads take their turns in
// different orders, and compares every output byte with one thread's.
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <numeric>
#include <random>
#include <vector>

#include "cases.h"
#include "cuda/plan.h"
#include "cuda/row_kernel.cuh"

Index threadIdx, blockIdx, blockDim;

namespace emulation {
namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 << 10;

enum Waits { kForNothing, kForBlock, kForWarp, kHasEnded };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Waits waits;
  int line;
  Exchange exchange;
  uint32_t value;
  int distance;
  uint32_t result;
};

std::vector<Fiber> fibers;
std::vector<int> turns;  // the order of the threads
ucontext_t scheduler;
const std::function<void()>* kernel;

[[noreturn]] void fail(const char* what, int line) {
  std::printf("thread %u of %u: %s, line %d\n", threadIdx.x, blockDim.x, what, line);
  std::exit(1);
}

Fiber& running() { return fibers[threadIdx.x]; }

void stop(Waits waits, int line) {
  running().waits = waits;
  running().line = line;
  swapcontext(&running().context, &scheduler);
}

void run_thread() {
  (*kernel)();
  running().waits = kHasEnded;
}

// Lets each thread that can run do so, up to its next wait; false if there is none.
bool take_turns() {
  bool any = false;
  for (int thread : turns) {
    if (fibers[thread].waits == kForNothing) {
      any = true;
      threadIdx.x = static_cast<unsigned>(thread);
      swapcontext(&scheduler, &fibers[thread].context);
    }
  }
  return any;
}

uint32_t result_of(const Fiber* warp, int lane) {
  const Fiber& own = warp[lane];
  if (own.exchange == kVote) {
    uint32_t bits = 0;
    for (int other = 0; other < kLanes; ++other) {
      bits |= static_cast<uint32_t>(warp[other].value != 0) << other;
    }
    return bits;
  }
  const int other = own.exchange == kUp ? lane - own.distance : lane + own.distance;
  return other < 0 || other >= kLanes ? own.value : warp[other].value;
}

// Where all 32 lanes wait for each other.
bool exchange_in_warps() {
  bool any = false;
  for (size_t first = 0; first < fibers.size(); first += kLanes) {
    Fiber* warp = &fibers[first];
    if (!std::all_of(warp, warp + kLanes, [](const Fiber& lane) { return lane.waits == kForWarp; })) {
      continue;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if (warp[lane].line != warp[0].line || warp[lane].exchange != warp[0].exchange) {
        fail("the lanes of a warp wait at different places", warp[lane].line);
      }
      warp[lane].result = result_of(warp, lane);
    }
    std::for_each(warp, warp + kLanes, [](Fiber& lane) { lane.waits = kForNothing; });
    any = true;
  }
  return any;
}

bool pass_barrier() {
  for (Fiber& fiber : fibers) {
    if (fiber.waits != kForBlock) {
      return false;
    }
    if (fiber.line != fibers[0].line) {
      fail("the threads of a block wait at different barriers", fiber.line);
    }
  }
  std::for_each(fibers.begin(), fibers.end(), [](Fiber& fiber) { fiber.waits = kForNothing; });
  return true;
}

}  // namespace

void wait_for_block(int line) { stop(kForBlock, line); }

uint32_t wait_for_warp(int line, unsigned lanes, Exchange exchange, uint32_t value, int distance) {
  if (lanes != 0xffffffffu) {
    fail("not all lanes take part", line);
  }
  Fiber& own = running();
  own.exchange = exchange;
  own.value = value;
  own.distance = distance;
  stop(kForWarp, line);
  return own.result;
}

// One block of the kernel.
void run_block(const std::function<void()>& body, int threads, const std::vector<int>& order) {
  kernel = &body;
  turns = order;
  fibers.resize(threads);
  blockDim.x = static_cast<unsigned>(threads);
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(kStackBytes);
    fiber.waits = kForNothing;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_thread, 0);
  }
  while (take_turns() || exchange_in_warps() || pass_barrier()) {
  }
  for (const Fiber& fiber : fibers) {
    if (fiber.waits != kHasEnded) {
      fail("some threads wait for others that never come", fiber.line);
    }
  }
}

}  // namespace emulation

namespace rhythm_kernels {
namespace cuda {

constexpr int kSharedWords = 16384;
uint32_t shared[kSharedWords];

}  // namespace cuda

namespace {

constexpr int kCases = 240;
constexpr int kBlockSizes[] = {32, 64, 256};
constexpr int kRarely = 30;
constexpr int kBehind = 4096;  // words that nobody may write
constexpr uint32_t kUntouched = 0xffffffffu;

std::vector<int> order_of(int threads, int number) {
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (number % 3 == 1) {
    std::reverse(order.begin(), order.end());
  } else if (number % 3 == 2) {
    std::shuffle(order.begin(), order.end(), std::mt19937(static_cast<uint32_t>(number)));
  }
  return order;
}

// Launches a row like cuda::Device, with little shared memory or much. A thousand fibers are slow, so there are often
// fewer threads.
template <class Row>
void run_blocks(const Row& row, const Sequences& sequences, int number) {
  const int64_t shared_bytes = number % 3 == 0 ? 2 << 10 : number % 3 == 1 ? 4 << 10 : sizeof(cuda::shared);
  const cuda::Plan plan = cuda::plan_launch(Row::kScratch, sequences, shared_bytes);
  const int threads = number % kRarely == 0 ? plan.threads : kBlockSizes[number / 3 % std::size(kBlockSizes)];
  const uint32_t* end = cuda::shared + plan.shared_bytes / sizeof(uint32_t);
  std::vector<uint32_t> workspace(plan.workspace_words + kBehind, kUntouched);
  for (int64_t index = 0; index < sequences.count; ++index) {
    std::fill(std::begin(cuda::shared), std::end(cuda::shared), kUntouched);
    blockIdx.x = static_cast<unsigned>(index);
    emulation::run_block(
        [&] { cuda::row_kernel(row, sequences, plan.capacity, workspace.data()); }, threads, order_of(threads, number));
    const auto touched = [](uint32_t word) { return word != kUntouched; };
    if (plan.shared_bytes > shared_bytes || std::any_of(end, std::cend(cuda::shared), touched)) {
      std::printf("case %d: a block wrote behind its shared memory\n", number);
      std::exit(1);
    }
    if (std::any_of(workspace.end() - kBehind, workspace.end(), touched)) {
      std::printf("case %d: a block wrote behind the workspace\n", number);
      std::exit(1);
    }
  }
}

}  // namespace
}  // namespace rhythm_kernels

int main() {
  using namespace rhythm_kernels;
  const auto run = [](const auto& row, const Sequences& sequences, uint32_t*, int number) {
    run_blocks(row, sequences, number);
  };
  Comparison comparison(run, kCases);
  std::puts("every kernel has the same results");
}
