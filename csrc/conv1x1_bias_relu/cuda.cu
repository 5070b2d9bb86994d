// fused_cnn::conv1x1_bias_relu_fwd and _bwd on CUDA; see cuda/gemm/pointwise_conv.cuh.
#include "cuda/gemm/pointwise_conv.cuh"

namespace fused_cnn {
namespace {

Tensor conv1x1_bias_relu_fwd(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                             std::optional<Tensor> residual, Ints stride, bool relu) {
  const char* op = "conv1x1_bias_relu_fwd";
  check_1x1(op, weight);
  return pointwise_conv_forward(op, x, weight, bias, residual, stride, relu);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv1x1_bias_relu_bwd(const Tensor& grad_out, std::optional<Tensor> out,
                                                                 const Tensor& x, const Tensor& weight, Ints stride,
                                                                 bool needs_x, bool needs_weight, bool needs_bias) {
  const char* op = "conv1x1_bias_relu_bwd";
  check_1x1(op, weight);
  return pointwise_conv_backward(op, grad_out, out, x, weight, stride, needs_x, needs_weight, needs_bias);
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("conv1x1_bias_relu_fwd", FUSED_CNN_BOX(&fused_cnn::conv1x1_bias_relu_fwd));
  m.impl("conv1x1_bias_relu_bwd", FUSED_CNN_BOX(&fused_cnn::conv1x1_bias_relu_bwd));
}
