// The kernels that are compiled. Hopper's of CUTLASS one tile to a file of this folder, for all its types: the first
// takes nvcc a minute, another type 10 to 20 s more; the others take seconds.
#pragma once
#include "cuda/gemm/gemm.h"

namespace fused_cnn {

template <typename T>
cudaError_t sm80_product(const Gemm& gemm, int multiprocessors, cudaStream_t stream);

template <typename T, int kRows, int kColumns>
cudaError_t sm90a_product(const Gemm& gemm, int multiprocessors, cudaStream_t stream);

template <typename T, int kRows, int kColumns>
cudaError_t sm90a_convolution(const Convolution& conv, cudaStream_t stream);

template <typename T, int kRows, int kColumns>
cudaError_t sm90a_split(const Convolution& conv, int multiprocessors, cudaStream_t stream);

}  // namespace fused_cnn
