// Loops that several rooms share: the epilogue behind a library's convolution, and its gradient.
#pragma once
#include "cpu/level.h"
#include "shared/dtype.h"

namespace fused_cnn {

// out = act(out + residual) in place over n adjacent elements; residual may be null, act is ReLU or the identity.
FUSED_CNN_KERNEL(void epilogue(DType dtype, void* out, const void* residual, int64_t n, bool relu))

// For rows [begin, end) of `channels` adjacent elements: grad = grad_out where out > 0 or NaN (everywhere if out is
// null), and sums[c] += the column sums of grad. grad may be null where only the sums are wanted.
FUSED_CNN_KERNEL(void mask_and_sum(DType dtype, const void* grad_out, const void* out, void* grad, double* sums,
                                   int64_t begin, int64_t end, int64_t channels))

}  // namespace fused_cnn
