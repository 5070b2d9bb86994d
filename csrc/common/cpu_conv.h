// What the two convolution rooms share on the CPU.
#pragma once
#include "common/library_conv.h"

namespace fused_cnn {

// relu(conv(x, weight) + bias [+ residual]), checked.
Tensor cpu_conv_forward(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& residual, const ConvParams& params, bool relu);

// (grad_x, grad_weight, grad_bias, grad): `grad` is grad_out under the ReLU mask of `out`, which is also residual's gradient; empty
// tensors for what is not needed, and for `grad` where there is no ReLU (it would be grad_out itself).
std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_conv_backward(const char* op, const Tensor& grad_out,
                                                             const std::optional<Tensor>& out, const Tensor& x,
                                                             const Tensor& weight, const ConvParams& params,
                                                             bool needs_x, bool needs_weight, bool needs_bias);

}  // namespace fused_cnn
