#include "cuda/gemm/sm80.cuh"

cudaError_t fused_cnn::gemm_sm80_f16(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
  return run_gemm<f16_t, Sm80Gemm>(gemm, multiprocessors, stream);
}
