#include "cuda/gemm/sm90a.cuh"

template <>
cudaError_t fused_cnn::sm90a_wgrad<fused_cnn::f16_t>(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
  return launch_product<Sm90aWgrad<f16_t>::Kernel, /*kAlongK=*/false>(gemm, gemm.n, gemm.epilogue, multiprocessors,
                                                                     stream);
}
