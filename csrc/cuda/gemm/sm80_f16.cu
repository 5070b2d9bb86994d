#include "cuda/gemm/sm80.cuh"

template <>
cudaError_t fused_cnn::sm80_product<fused_cnn::f16_t>(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
  return run_sm80<f16_t>(gemm, multiprocessors, stream);
}
