#include "cuda/gemm/sm90a.cuh"

cudaError_t fused_cnn::gemm_sm90a_bf16(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
  return run_gemm<bf16_t, Sm90aGemm>(gemm, multiprocessors, stream);
}
