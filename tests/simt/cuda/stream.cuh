// cuda/stream.cuh where there is no CUDA.
#pragma once
#include <cuda_runtime.h>

namespace fused_cnn {

inline cudaStream_t current_stream(int32_t) {
  return simt::current_stream;
}

class CurrentStream {
 public:
  CurrentStream(int32_t, cudaStream_t stream) : before_(simt::current_stream) { simt::current_stream = stream; }
  ~CurrentStream() { simt::current_stream = before_; }

 private:
  cudaStream_t before_;
};

}  // namespace fused_cnn
