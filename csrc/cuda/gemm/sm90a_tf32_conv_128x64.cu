#include "cuda/gemm/sm90a_conv.cuh"

template <>
cudaError_t fused_cnn::sm90a_convolution<float, 128, 64>(const Convolution& conv, cudaStream_t stream) {
  return Sm90aConvolution<float, 128, 64>::run(conv, stream);
}
