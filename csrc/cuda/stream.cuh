// PyTorch's current stream. The function that gives it is in libtorch_cuda, which Python loads for itself alone: a
// library that named it would not load, or would end the process at its first call. So it is looked up.
#pragma once
#include <cuda_runtime.h>
#include <dlfcn.h>
#include "shared/checks.h"

namespace fused_cnn {

inline cudaStream_t current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  FUSED_CNN_CHECK(get != nullptr, "PyTorch's CUDA library is not loaded, or is older than this build needs");
  void* stream = nullptr;
  FUSED_CNN_CHECK(get(device, &stream) == 0, "no current CUDA stream for device ", device);
  return static_cast<cudaStream_t>(stream);
}

}  // namespace fused_cnn
