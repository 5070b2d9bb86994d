#include "cuda/gemm/sm90a.cuh"

template cudaError_t fused_cnn::sm90a_product<fused_cnn::bf16_t, 256, 128>(const Gemm&, int, cudaStream_t);
template cudaError_t fused_cnn::sm90a_product<fused_cnn::f16_t, 256, 128>(const Gemm&, int, cudaStream_t);
