// Loops over n adjacent elements; see math.h for the formulas.
#pragma once
#include "cpu/level.h"
#include "shared/dtype.h"

namespace fused_cnn {
FUSED_CNN_KERNEL(void add_relu_fwd(DType dtype, const void* x, const void* residual, void* out, int64_t n))
FUSED_CNN_KERNEL(void add_relu_bwd(DType dtype, const void* grad_out, const void* out, void* grad, int64_t n))
}  // namespace fused_cnn
