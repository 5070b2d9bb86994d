// What every CUDA launch shares: the device guard, PyTorch's current stream, the launch and its check, and the
// registration.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include "shared/checks.h"
#include "cuda/divisor.h"
#include "cuda/stream.cuh"

namespace fused_cnn {

constexpr int kSharedWithoutAsking = 48 << 10;  // bytes of shared memory that every launch may have

class Launch {
 public:
  explicit Launch(const Tensor& on) : guard_(on.get_device_index()), stream_(current_stream(on.get_device_index())) {}

  cudaStream_t stream() const { return stream_; }

  // kernel(arguments...) on columns x rows blocks of `threads` threads; nothing where there are no blocks.
  template <typename... Parameters, typename... Arguments>
  void run(const char* name, void (*kernel)(Parameters...), int64_t columns, int64_t rows, int threads,
           const Arguments&... arguments) const {
    run_with_shared(name, kernel, columns, rows, threads, /*bytes=*/0, arguments...);
  }

  // The same for a kernel that sizes its shared memory at its launch.
  template <typename... Parameters, typename... Arguments>
  void run_with_shared(const char* name, void (*kernel)(Parameters...), int64_t columns, int64_t rows, int threads,
                       int bytes, const Arguments&... arguments) const {
    if (columns == 0 || rows == 0) return;
    FUSED_CNN_CHECK(columns <= 0x7fffffff && rows <= 0xffff, name, ": ", columns, " x ", rows,
                    " blocks are more than one launch can take");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(columns), static_cast<unsigned>(rows));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream_;
    cudaError_t error = cudaSuccess;
    if (bytes > kSharedWithoutAsking) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    }
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    if (error != cudaSuccess) cudaGetLastError();  // or this library's next check would report it once more
    FUSED_CNN_CHECK(error == cudaSuccess, name, ": launch failed: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace fused_cnn

// The tests compile the same files for the CPU (tests/simt) and register them elsewhere.
#ifndef FUSED_CNN_CUDA_IMPL
#define FUSED_CNN_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CUDA, m)
#endif
