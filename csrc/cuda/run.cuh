// Runs a row of csrc/rows/ on every sequence of a batch: one launch, one block a sequence, no host synchronization.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "../ops/checks.h"
#include "../rows/sequences.h"
#include "row_kernel.cuh"

// Part of libtorch's stable C interface; its header declares it only in builds of torch with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace rhythm_kernels::cuda {

constexpr int kFewThreads = 256;
constexpr int64_t kFewTokens = 2048;
constexpr int64_t kPackedSharedBytes = 100 << 10;  // two blocks a multiprocessor, on an H100

inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
  }
}

inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

struct Device {
  template <class Row>
  static void run(const char* op, const Row& row, const Sequences& sequences, const Tensor& mask) {
    if (sequences.count == 0) {
      return;
    }
    const int32_t index = mask.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(index);
    constexpr int64_t kBytes = Row::kScratch * sizeof(uint32_t);  // a token
    int shared_bytes = 0;
    check_cuda(op, cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    const bool packed = sequences.cu_seqlens != nullptr;
    const int64_t most = shared_bytes - static_cast<int64_t>(sizeof(BlockScratch));
    int64_t capacity = (packed ? std::min(most, kPackedSharedBytes) : most) / kBytes;
    std::optional<Tensor> workspace;
    if (capacity < sequences.tokens) {
      workspace = torch::stable::new_empty(mask, {Row::kScratch * mask.numel()}, ScalarType::Int);
    }
    // rows of equal length fit all or not at all
    capacity = capacity >= sequences.tokens ? sequences.tokens : packed ? capacity : 0;
    // the most that is possible, and not what this call needs: another thread may be about to launch with more
    check_cuda(op, cudaFuncSetAttribute(row_kernel<Row>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    const int64_t mean = packed ? sequences.tokens / sequences.count : sequences.tokens;
    const int threads = mean <= kFewTokens ? kFewThreads : kThreads;
    row_kernel<<<
        static_cast<unsigned>(sequences.count),
        threads,
        sizeof(BlockScratch) + capacity * kBytes,
        current_stream(index)>>>(
        row,
        sequences,
        static_cast<int32_t>(capacity),
        workspace ? static_cast<uint32_t*>(workspace->mutable_data_ptr()) : nullptr);
    check_cuda(op, cudaGetLastError());
  }
};

}  // namespace rhythm_kernels::cuda
