// Loops over rows of channels; see math.h for the formulas. Vectors are float (double where x is),
// activations are of `dtype`.
#pragma once
#include "cpu/level.h"
#include "shared/dtype.h"

namespace fused_cnn {

// One normalised input: rows of x, `stride` elements apart, and its per-channel vectors; scale is rstd *
// weight.
struct BnInput {
  const void* x;
  int64_t stride;
  const void *mean, *scale, *bias;
};

// Where an output, or the gradient of one, lies. `bits`, if any, is ReLU's mask (bits.h).
struct BnRows {
  void* data;
  int64_t stride;
  uint8_t* bits;
};

// Per-channel sums of a task: of the masked gradient g, and of g * (x - mean) for each of the inputs.
struct BnSums {
  void* grad;
  void* grad_x[2];
};

// The gradient of one input: where it goes, and the vectors of math.h's grad_input (null with running
// statistics).
struct BnGrad {
  void* grad_x;
  const void *offset, *slope;
};

// Mean and sum of squared differences over `rows` rows.
FUSED_CNN_KERNEL(void bn_moments(DType dtype, const void* x, int64_t stride, int64_t channels, int64_t rows, void* mean,
                                 void* m2))

// out = relu(bn(x)), bn(x), relu(bn(x) + residual) or relu(bn(x) + bn(residual)): `count` inputs, `residual`
// if not null.
FUSED_CNN_KERNEL(void bn_apply(DType dtype, const BnInput* inputs, int count, const void* residual,
                               int64_t residual_stride, bool relu, BnRows out, int64_t channels, int64_t rows))

// sums of g = grad_out where ReLU let the output through (known from `out.bits`, or recomputed). `masked`, if
// not null, receives g.
FUSED_CNN_KERNEL(void bn_reduce(DType dtype, const BnInput* inputs, int count, BnRows grad_out, bool relu, void* masked,
                                BnSums sums, int64_t channels, int64_t rows))

// The gradient of every input, from the sums over all rows.
FUSED_CNN_KERNEL(void bn_grad_input(DType dtype, const BnInput* inputs, int count, BnRows grad_out, bool relu,
                                    const BnGrad* grads, int64_t channels, int64_t rows))

}  // namespace fused_cnn
