// fused_cnn::conv_bias_relu_fwd and _bwd on CUDA, for kernels of any size: 1x1 as a product of our own
// (cuda/gemm/pointwise_conv.cuh), else the library's convolution and its gradients, with one pass for bias, residual
// and ReLU, and one for the mask and the bias's gradient.
#include "cuda/gemm/pointwise_conv.cuh"

namespace fused_cnn {
namespace {

bool is_pointwise(const Tensor& weight, const ConvParams& params) {
  return weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1 && params.groups == 1 &&
         params.padding == Ints{0, 0};
}

Tensor conv_bias_relu_fwd(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                          std::optional<Tensor> residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
                          bool relu) {
  const char* op = "conv_bias_relu_fwd";
  const ConvParams params{stride, padding, dilation, groups};
  if (is_pointwise(weight, params)) return pointwise_conv_forward(op, x, weight, bias, residual, stride, relu);
  check_conv(op, x, weight, bias, residual, params);
  const Launch launch(x);
  const Tensor y = library_conv(x, weight, std::nullopt, params);
  const int64_t channels = weight.size(0);
  const RowResult out(y, channels, result_format(x));
  std::optional<RowView> addend;
  if (residual) addend = rows_of(*residual);
  if (bias) bias = torch::stable::contiguous(*bias);
  finish_convolution(launch, y, bias, addend ? &*addend : nullptr, relu,
                     {{out.data, channels, static_cast<int>(channels)}});
  return out.finish();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bias_relu_bwd(const Tensor& grad_out, std::optional<Tensor> out,
                                                              const Tensor& x, const Tensor& weight, Ints stride,
                                                              Ints padding, Ints dilation, int64_t groups, bool needs_x,
                                                              bool needs_weight, bool needs_bias) {
  const char* op = "conv_bias_relu_bwd";
  const ConvParams params{stride, padding, dilation, groups};
  if (is_pointwise(weight, params)) {
    return pointwise_conv_backward(op, grad_out, out, x, weight, stride, needs_x, needs_weight, needs_bias);
  }
  check_conv(op, x, weight, std::nullopt, grad_out, params);
  if (out) check_like(op, "grad_out", grad_out, "out", *out);
  const Launch launch(x);
  const MaskedGradient masked(launch, grad_out, out, needs_bias);
  Tensor grad_x = nothing(grad_out), grad_weight = nothing(grad_out);
  if (needs_x || needs_weight) {
    auto [of_x, of_weight] = library_conv_backward(masked.rows.tensor, x, weight, params, needs_x, needs_weight);
    if (needs_x) grad_x = dense(of_x, result_format(x));
    if (needs_weight) grad_weight = dense(of_weight, result_format(weight));
  }
  return {grad_x, grad_weight, masked.bias, masked.residual(grad_out)};
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("conv_bias_relu_fwd", FUSED_CNN_BOX(&fused_cnn::conv_bias_relu_fwd));
  m.impl("conv_bias_relu_bwd", FUSED_CNN_BOX(&fused_cnn::conv_bias_relu_bwd));
}
