// PyTorch's current stream. The functions that give and change it are in libtorch_cuda, which Python loads for itself
// alone: a library that named them would not load, or would end the process at its first call. So they are looked up.
#pragma once
#include <cuda_runtime.h>
#include <dlfcn.h>
#include "shared/checks.h"

namespace fused_cnn {

template <typename Function>
Function of_torch_cuda(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* function = library ? dlsym(library, name) : nullptr;
  FUSED_CNN_CHECK(function != nullptr,
                  "PyTorch's CUDA library is not loaded, or is older than this build needs: ", name, " is missing");
  return reinterpret_cast<Function>(function);
}

inline cudaStream_t current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const auto get = of_torch_cuda<Get>("aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  FUSED_CNN_CHECK(get(device, &stream) == 0, "no current CUDA stream for device ", device);
  return static_cast<cudaStream_t>(stream);
}

// Makes a stream PyTorch's current one while it lives: what its operators launch and allocate is on it.
class CurrentStream {
 public:
  CurrentStream(int32_t device, cudaStream_t stream) {
    using Begin = AOTITorchError (*)(void*, int32_t, CUDAStreamGuardHandle*);
    static const auto begin = of_torch_cuda<Begin>("aoti_torch_create_cuda_stream_guard");
    static const auto end = of_torch_cuda<End>("aoti_torch_delete_cuda_stream_guard");
    end_ = end;
    FUSED_CNN_CHECK(begin(stream, device, &guard_) == 0, "PyTorch does not take a stream as its current one");
  }
  CurrentStream(const CurrentStream&) = delete;
  ~CurrentStream() { end_(guard_); }

 private:
  using End = AOTITorchError (*)(CUDAStreamGuardHandle);
  End end_;
  CUDAStreamGuardHandle guard_ = nullptr;
};

}  // namespace fused_cnn
