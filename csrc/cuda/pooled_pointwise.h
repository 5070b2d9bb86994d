// The last branch of an Inception block in one kernel: a 3x3 max pool of stride 1 and the 1x1 convolution of what it
// gives, with bias and ReLU (cuda/pooled_pointwise.cu).
#pragma once
#include "cuda/gemm/gemm.h"
#include "shared/rows.h"

namespace fused_cnn {

// relu(pooled weight^T + bias) into the slice. `in` has x's rows; weight is (slice.columns, C, 1, 1), and it and bias
// are contiguous. All are of a 16-bit type and on 16 bytes; C and slice.columns are multiples of 8.
void run_pooled_pointwise(const Tensor& x, const RowView& in, const Tensor& weight, const Tensor& bias,
                          const GemmSlice& out);

}  // namespace fused_cnn
