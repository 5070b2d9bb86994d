#include "cuda/gemm/sm90a.cuh"

template <>
cudaError_t fused_cnn::sm90a_product<fused_cnn::f16_t, 256, 128>(const Gemm& gemm, int multiprocessors,
                                                                 cudaStream_t stream) {
  return Sm90aProduct<f16_t, 256, 128>::run(gemm, multiprocessors, stream);
}
