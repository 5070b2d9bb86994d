#include "cuda/gemm/sm80.cuh"

namespace fused_cnn {

cudaError_t gemm_sm80_f16(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
  return gemm_sm80<f16_t>(gemm, multiprocessors, stream);
}

}  // namespace fused_cnn
