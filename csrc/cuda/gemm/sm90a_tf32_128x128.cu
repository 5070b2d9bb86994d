#include "cuda/gemm/sm90a.cuh"

template <>
cudaError_t fused_cnn::sm90a_product<float, 128, 128>(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
  return Sm90aProduct<float, 128, 128>::run(gemm, multiprocessors, stream);
}
