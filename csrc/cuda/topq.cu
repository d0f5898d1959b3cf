// segment_topq on CUDA: one block a row, no host synchronization.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../checks.h"
#include "../select.h"
#include "block_select.cuh"
#include "launch.h"

namespace rhythm_kernels::cuda {
namespace {

// values, mask, selected: contiguous [B,T], one block for each of the B rows.
__global__ void __launch_bounds__(kThreads) segment_topq_kernel(
    const float* __restrict__ values,
    const uint8_t* __restrict__ mask,
    uint8_t* __restrict__ selected,
    int32_t tokens,
    double q,
    bool largest) {
  __shared__ SelectScratch scratch;
  __shared__ int32_t warp_ties[kWarps];
  const int64_t row_start = static_cast<int64_t>(blockIdx.x) * tokens;
  values += row_start;
  mask += row_start;
  selected += row_start;

  const Threshold threshold = select_threshold(values, mask, tokens, q, largest, scratch);
  if (threshold.all_ties) {
    for (int64_t t = threadIdx.x; t < tokens; t += kThreads) {
      selected[t] = mask[t] && rank_key(order_key(values[t]), largest) >= threshold.key;
    }
    return;
  }

  // Ties go to the lower positions: count the equal keys before each position, a tile of kThreads positions at a time.
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  int32_t ties_before_tile = 0;
  for (int64_t tile = 0; tile < tokens; tile += kThreads) {
    const int64_t t = tile + threadIdx.x;
    const bool inside = t < tokens && mask[t];
    const uint32_t key = inside ? rank_key(order_key(values[t]), largest) : kNoKey;
    const bool tie = inside && key == threshold.key;
    const unsigned ties_in_warp = __ballot_sync(kAllLanes, tie);
    if (lane == 0) {
      warp_ties[warp] = __popc(ties_in_warp);
    }
    __syncthreads();
    int32_t before = ties_before_tile + __popc(ties_in_warp & ((1u << lane) - 1));
    for (int other = 0; other < kWarps; ++other) {
      before += other < warp ? warp_ties[other] : 0;
      ties_before_tile += warp_ties[other];
    }
    if (t < tokens) {
      selected[t] = inside && (key > threshold.key || (tie && before < threshold.ties));
    }
    __syncthreads();  // before the next tile overwrites warp_ties
  }
}

Tensor segment_topq(const Tensor& values, const Tensor& mask, double q, bool largest) {
  check_rows("segment_topq", values, mask);
  check_fraction("segment_topq", "q", q);
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  const Tensor values_rows = torch::stable::contiguous(values);
  const Tensor mask_rows = torch::stable::contiguous(mask);
  Tensor selected = torch::stable::new_empty(mask_rows, mask_rows.sizes());
  if (selected.numel() > 0) {
    segment_topq_kernel<<<values.size(0), kThreads, 0, current_stream(values.get_device_index())>>>(
        static_cast<const float*>(values_rows.const_data_ptr()),
        static_cast<const uint8_t*>(mask_rows.const_data_ptr()),
        static_cast<uint8_t*>(selected.mutable_data_ptr()),
        static_cast<int32_t>(values.size(1)),
        q,
        largest);
    check_launch("segment_topq");
  }
  return selected;
}

}  // namespace
}  // namespace rhythm_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(rhythm_kernels, CUDA, m) {
  m.impl("segment_topq", TORCH_BOX(&rhythm_kernels::cuda::segment_topq));
}
