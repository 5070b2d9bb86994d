// The kernels that take a second to compile.
#include "cuda/gemm/sm90a_sliding.cuh"
#include "cuda/gemm/sm90a_split.cuh"

template cudaError_t fused_cnn::sm90a_sliding<fused_cnn::bf16_t, 256, 64>(const Convolution&, int, cudaStream_t);
template cudaError_t fused_cnn::sm90a_sliding<fused_cnn::bf16_t, 256, 32>(const Convolution&, int, cudaStream_t);
template cudaError_t fused_cnn::sm90a_sliding<fused_cnn::bf16_t, 128, 64>(const Convolution&, int, cudaStream_t);
template cudaError_t fused_cnn::sm90a_split<fused_cnn::bf16_t, 64, 64>(const Convolution&, int, cudaStream_t);
template cudaError_t fused_cnn::sm90a_split<fused_cnn::bf16_t, 64, 32>(const Convolution&, int, cudaStream_t);
