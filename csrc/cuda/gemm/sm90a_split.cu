#include "cuda/gemm/sm90a_split.cuh"

template cudaError_t fused_cnn::sm90a_split<fused_cnn::bf16_t, 64, 64>(const Convolution&, int, cudaStream_t);
template cudaError_t fused_cnn::sm90a_split<fused_cnn::f16_t, 64, 64>(const Convolution&, int, cudaStream_t);
