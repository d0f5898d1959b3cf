// find_peaks on CUDA: one block a row, no host synchronization.
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

// Whether the plateau of a position falls at its end, as far as the positions looked at so far tell.
enum Fall : int32_t { kStaysUp, kFalls, kGoesOn };

// values, mask, peaks: contiguous [B,T], one block for each of the B rows.
__global__ void __launch_bounds__(kThreads) find_peaks_kernel(
    const float* __restrict__ values,
    const uint8_t* __restrict__ mask,
    uint8_t* __restrict__ peaks,
    int32_t tokens,
    double min_quantile) {
  __shared__ SelectScratch scratch;
  __shared__ int32_t warp_falls[kWarps];
  const int64_t row_start = static_cast<int64_t>(blockIdx.x) * tokens;
  values += row_start;
  mask += row_start;
  peaks += row_start;

  uint32_t floor = kNoKey;
  if (min_quantile > 0) {
    floor = peak_floor(select_threshold(values, mask, tokens, min_quantile, /*largest=*/false, scratch));
  }

  // Tiles of kThreads positions from right to left: a plateau's end decides for all of it, across warps and tiles.
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  int32_t right_of_tile = kStaysUp;
  for (int64_t tile = int64_t{tokens - 1} / kThreads * kThreads; tile >= 0; tile -= kThreads) {
    const int64_t t = tile + threadIdx.x;
    const uint32_t previous = t > 0 && t < tokens ? key_at(values, mask, t - 1) : kNoKey;
    const uint32_t key = t < tokens ? key_at(values, mask, t) : kNoKey;
    const uint32_t next = t + 1 < tokens ? key_at(values, mask, t + 1) : kNoKey;
    const unsigned ends = __ballot_sync(kAllLanes, plateau_ends(key, next)) >> lane;
    const unsigned lowered = __ballot_sync(kAllLanes, is_lower(next, key)) >> lane;
    int32_t fall = kGoesOn;
    if (ends != 0) {
      fall = (lowered >> (__ffs(ends) - 1)) & 1 ? kFalls : kStaysUp;
    }
    if (lane == 0) {
      warp_falls[warp] = fall;
    }
    __syncthreads();
    int32_t right_of_warp = right_of_tile;
    for (int other = kWarps - 1; other >= 0; --other) {
      const int32_t found = warp_falls[other];
      right_of_warp = other > warp && found != kGoesOn ? found : right_of_warp;
      right_of_tile = found != kGoesOn ? found : right_of_tile;
    }
    fall = fall == kGoesOn ? right_of_warp : fall;
    if (t < tokens) {
      peaks[t] = is_peak(previous, key, fall == kFalls, floor);
    }
    __syncthreads();  // before the next tile overwrites warp_falls
  }
}

Tensor find_peaks(const Tensor& values, const Tensor& mask, double min_quantile) {
  check_rows("find_peaks", values, mask);
  check_fraction("find_peaks", "min_quantile", min_quantile);
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  const Tensor values_rows = torch::stable::contiguous(values);
  const Tensor mask_rows = torch::stable::contiguous(mask);
  Tensor peaks = torch::stable::new_empty(mask_rows, mask_rows.sizes());
  if (peaks.numel() > 0) {
    find_peaks_kernel<<<values.size(0), kThreads, 0, current_stream(values.get_device_index())>>>(
        static_cast<const float*>(values_rows.const_data_ptr()),
        static_cast<const uint8_t*>(mask_rows.const_data_ptr()),
        static_cast<uint8_t*>(peaks.mutable_data_ptr()),
        static_cast<int32_t>(values.size(1)),
        min_quantile);
    check_launch("find_peaks");
  }
  return peaks;
}

}  // namespace
}  // namespace rhythm_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(rhythm_kernels, CUDA, m) {
  m.impl("find_peaks", TORCH_BOX(&rhythm_kernels::cuda::find_peaks));
}
