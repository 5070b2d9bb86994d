// The two loops over rows of channels that several rooms share: what follows a convolution, and its gradient.
#pragma once
#include "cpu/level.h"
#include "shared/branches.h"

namespace fused_cnn {

// `bias` is of the compute type; there is a bias or a residual, not both.
FUSED_CNN_KERNEL(void bias_residual_relu(DType dtype, const BiasResidualRelu& args, bool relu, int64_t begin_row,
                                         int64_t end_row))

// sums[c] += the branch's sums of these rows, c counted from grad_out's first channel, unless sums is null.
FUSED_CNN_KERNEL(void drelu_bgrad(DType dtype, const Rows& grad_out, const Rows& out, const DreluBranch& branch,
                                  int64_t begin_row, int64_t end_row, double* sums))

}  // namespace fused_cnn
