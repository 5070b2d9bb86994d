// Loops over the rows [begin, end) of channels; see math.h for the formulas. Vectors are float (double where x is),
// activations are of `dtype`.
#pragma once
#include "cpu/level.h"
#include "cpu/rows.h"

namespace fused_cnn {

// One normalised input and its per-channel vectors; scale is rstd * weight.
struct BnInput {
  Rows x;
  const void *mean, *scale, *bias;
};

// out = relu(bn(x)), bn(x), relu(bn(x) + residual) or relu(bn(x) + bn(second x)). `bits`, if any, receives ReLU's mask
// (bits.h) where there is a residual.
struct BnForward {
  BnInput inputs[2];
  int count;
  Rows residual = {}, out;
  uint8_t* bits = nullptr;
  bool relu = true;
  int64_t channels;
};

// The gradient of one input: where it goes, and the vectors of math.h's grad_input (null with running statistics).
struct BnGrad {
  Rows grad_x;
  const void *offset, *slope;
};

// The backward of the same. g is grad_out where ReLU let the output through, known from `bits` or recomputed; with
// `bits`, bn_reduce writes it to `masked`, where bn_grad_input finds it. A task's sums are those of g, from column
// `sum` on, and those of g * (x - mean) of each input, from `sum_x` on.
struct BnBackward {
  BnInput inputs[2];
  int count;
  Rows grad_out;
  const uint8_t* bits = nullptr;
  Rows masked = {};
  bool relu = true;
  int64_t channels;
  int64_t sum, sum_x[2];
  BnGrad grads[2];
};

// Mean and sum of squared differences.
FUSED_CNN_KERNEL(void bn_moments(DType dtype, Rows x, int64_t channels, int64_t begin, int64_t end, void* mean,
                                 void* m2))
FUSED_CNN_KERNEL(void bn_apply(DType dtype, const BnForward& args, int64_t begin, int64_t end))
FUSED_CNN_KERNEL(void bn_reduce(DType dtype, const BnBackward& args, int64_t begin, int64_t end, void* sums))
// From the sums over all rows.
FUSED_CNN_KERNEL(void bn_grad_input(DType dtype, const BnBackward& args, int64_t begin, int64_t end))

}  // namespace fused_cnn
