// Loops over the rows [begin, end) of a branch; see math.h for the formulas. Vectors are float (double where x is),
// activations are of `dtype`.
#pragma once
#include "batch_norm/branch.h"
#include "cpu/level.h"

namespace fused_cnn {

// Mean and sum of squared differences.
FUSED_CNN_KERNEL(void bn_moments(DType dtype, Rows x, int64_t channels, int64_t begin, int64_t end, void* mean,
                                 void* m2))
// `mask`, if any, receives ReLU's mask where there is a plain residual: bit c of a row of C channels, of ceil(C / 8)
// bytes, is set where the output is not <= 0 (so also for NaN).
FUSED_CNN_KERNEL(void bn_apply(DType dtype, const BnBranch& branch, Residual residual, bool relu, uint8_t* mask,
                               int64_t begin, int64_t end))
// Adds to `sums` of g, then of g * (x - mean) of each normalised input, `total` channels each. g is grad_out where ReLU
// let the output through, computed again or, with a plain residual, known from `mask`: that is the residual's gradient.
FUSED_CNN_KERNEL(void bn_reduce(DType dtype, const BnBranch& branch, Residual residual, bool relu, const uint8_t* mask,
                                int64_t total, int64_t begin, int64_t end, void* sums))
// From the sums over all rows: math.h's offset and slope, `total` channels for each normalised input.
FUSED_CNN_KERNEL(void bn_grad_input(DType dtype, const BnBranch& branch, Residual residual, bool relu,
                                    const void* offset, const void* slope, int64_t total, int64_t begin, int64_t end))

}  // namespace fused_cnn
