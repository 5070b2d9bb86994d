#include "cuda/gemm/sm90a.cuh"

namespace fused_cnn {

cudaError_t gemm_sm90a_f16(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
  return gemm_sm90a<f16_t>(gemm, multiprocessors, stream);
}

}  // namespace fused_cnn
