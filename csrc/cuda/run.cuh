// Runs a row of csrc/rows/ on every sequence of a batch in one launch, a block for each. The host does not wait.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "../ops/checks.h"
#include "../rows/sequences.h"
#include "plan.h"
#include "row_kernel.cuh"

// It is part of libtorch's stable C interface, but its header declares it only in builds of torch with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace rhythm_kernels::cuda {

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
  static void run(const char* op, const Row& row, const Sequences& sequences, const Tensor& response_mask) {
    if (sequences.count == 0) {
      return;
    }
    const int32_t index = response_mask.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(index);
    int shared_bytes = 0;
    check_cuda(op, cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    const Plan plan = plan_launch(Row::kScratch, sequences, shared_bytes);
    std::optional<Tensor> workspace;
    if (plan.workspace_words > 0) {
      workspace = torch::stable::new_empty(response_mask, {plan.workspace_words}, ScalarType::Int);
    }
    // the most that is possible, not only what this call needs: another thread may be about to launch with more
    check_cuda(op, cudaFuncSetAttribute(row_kernel<Row>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    const auto blocks = static_cast<unsigned>(sequences.count);
    row_kernel<<<blocks, plan.threads, plan.shared_bytes, current_stream(index)>>>(
        row, sequences, plan.capacity, workspace ? static_cast<uint32_t*>(workspace->mutable_data_ptr()) : nullptr);
    check_cuda(op, cudaGetLastError());
  }
};

}  // namespace rhythm_kernels::cuda
