#include "cuda/gemm/sm90a_conv.cuh"

template cudaError_t fused_cnn::sm90a_convolution<fused_cnn::bf16_t, 128, 64>(const Convolution&, cudaStream_t);
template cudaError_t fused_cnn::sm90a_convolution<fused_cnn::f16_t, 128, 64>(const Convolution&, cudaStream_t);
template cudaError_t fused_cnn::sm90a_convolution<float, 128, 64>(const Convolution&, cudaStream_t);
