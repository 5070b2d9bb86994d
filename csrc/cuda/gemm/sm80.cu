#include "cuda/gemm/sm80.cuh"

template cudaError_t fused_cnn::sm80_product<fused_cnn::bf16_t>(const Gemm&, int, cudaStream_t);
template cudaError_t fused_cnn::sm80_product<fused_cnn::f16_t>(const Gemm&, int, cudaStream_t);
