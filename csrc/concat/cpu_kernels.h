// Loops over rows of one branch's channels; strides are in elements. See math.h for the formulas.
#pragma once
#include "cpu/level.h"
#include "shared/dtype.h"

namespace fused_cnn {

// out = relu(x + bias); `bias` may be null, without `use_relu` out = x + bias.
FUSED_CNN_KERNEL(void concat_fwd(DType dtype, const void* x, int64_t x_stride, const void* bias, bool use_relu,
                                 void* out, int64_t out_stride, int64_t channels, int64_t rows))

// grad_x = grad_out where ReLU let `out` through (everywhere if out is null), dense; adds its sums to `sums`
// unless null.
FUSED_CNN_KERNEL(void concat_bwd(DType dtype, const void* grad_out, int64_t grad_stride, const void* out,
                                 int64_t out_stride, void* grad_x, void* sums, int64_t channels, int64_t rows))

}  // namespace fused_cnn
