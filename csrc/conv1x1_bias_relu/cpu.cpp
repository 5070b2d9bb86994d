// fused_cnn::conv1x1_bias_relu_fwd and conv1x1_bias_relu_bwd on the CPU; see cpu/conv.h.
#include "cpu/conv.h"

namespace fused_cnn {
namespace {

Tensor conv1x1_bias_relu_fwd(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                             std::optional<Tensor> residual, Ints stride, bool relu) {
  check_1x1("conv1x1_bias_relu_fwd", weight);
  return cpu_conv_forward("conv1x1_bias_relu_fwd", x, weight, bias, residual, pointwise_params(stride), relu);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv1x1_bias_relu_bwd(const Tensor& grad_out, std::optional<Tensor> out,
                                                                 const Tensor& x, const Tensor& weight, Ints stride,
                                                                 bool needs_x, bool needs_weight, bool needs_bias) {
  check_1x1("conv1x1_bias_relu_bwd", weight);
  return cpu_conv_backward("conv1x1_bias_relu_bwd", grad_out, out, x, weight, pointwise_params(stride), needs_x,
                           needs_weight, needs_bias);
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("conv1x1_bias_relu_fwd", FUSED_CNN_BOX(&fused_cnn::conv1x1_bias_relu_fwd));
  m.impl("conv1x1_bias_relu_bwd", FUSED_CNN_BOX(&fused_cnn::conv1x1_bias_relu_bwd));
}
