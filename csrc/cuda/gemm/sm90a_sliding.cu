#include "cuda/gemm/sm90a_sliding.cuh"

template cudaError_t fused_cnn::sm90a_sliding<fused_cnn::bf16_t, 256, 64>(const Convolution&, int, cudaStream_t);
template cudaError_t fused_cnn::sm90a_sliding<fused_cnn::bf16_t, 256, 32>(const Convolution&, int, cudaStream_t);
template cudaError_t fused_cnn::sm90a_sliding<fused_cnn::bf16_t, 128, 64>(const Convolution&, int, cudaStream_t);
template cudaError_t fused_cnn::sm90a_sliding<fused_cnn::f16_t, 256, 64>(const Convolution&, int, cudaStream_t);
template cudaError_t fused_cnn::sm90a_sliding<fused_cnn::f16_t, 256, 32>(const Convolution&, int, cudaStream_t);
template cudaError_t fused_cnn::sm90a_sliding<fused_cnn::f16_t, 128, 64>(const Convolution&, int, cudaStream_t);
