// The two loops over rows of channels that several rooms share: what follows a convolution, and its gradient.
#pragma once
#include "cpu/level.h"
#include "cpu/rows.h"

namespace fused_cnn {

// out = act(y + bias), act(y + residual) or act(y), where both are null; act is ReLU or the identity. `bias` is of the
// compute type; out may be y.
struct BiasResidualRelu {
  Rows y;
  const void* bias = nullptr;
  Rows residual = {}, out;
  bool relu = true;
  int64_t channels;
};
FUSED_CNN_KERNEL(void bias_residual_relu(DType dtype, const BiasResidualRelu& args, int64_t begin_row, int64_t end_row))

// grad = grad_out where out > 0 or NaN (everywhere where `out` is null), and sums[c] += its column sums unless sums is
// null. Where `grad` is null, the column sums of grad_out alone.
struct DreluBgrad {
  Rows grad_out, out = {}, grad = {};
  int64_t channels;
};
FUSED_CNN_KERNEL(void drelu_bgrad(DType dtype, const DreluBgrad& args, int64_t begin_row, int64_t end_row,
                                  double* sums))

}  // namespace fused_cnn
