// What every CUDA launch shares: the device guard, PyTorch's current stream, the launch check, and 16-byte vectors.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include "common/checks.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fused_cnn {

class Launch {
 public:
  explicit Launch(const Tensor& on) : guard_(on.get_device_index()) {
    void* stream = nullptr;
    FUSED_CNN_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream) == 0,
                    "no current CUDA stream for device ", on.get_device_index());
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }
  void check(const char* kernel) const {
    const cudaError_t error = cudaGetLastError();
    FUSED_CNN_CHECK(error == cudaSuccess, kernel, ": launch failed: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// 16 bytes of T, moved by one load or store instruction.
template <typename T>
struct alignas(16) Vec {
  static constexpr int size = 16 / sizeof(T);
  T v[size];
};

inline bool aligned16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

}  // namespace fused_cnn
