// fused_cnn::conv_bias_relu_fwd and conv_bias_relu_bwd on the CPU, for kernels of any size; see cpu/conv.h.
#include "cpu/conv.h"

namespace fused_cnn {
namespace {

Tensor conv_bias_relu_fwd(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                          std::optional<Tensor> residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
                          bool relu) {
  return cpu_conv_forward("conv_bias_relu_fwd", x, weight, bias, residual, {stride, padding, dilation, groups}, relu);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bias_relu_bwd(const Tensor& grad_out, std::optional<Tensor> out,
                                                              const Tensor& x, const Tensor& weight, Ints stride,
                                                              Ints padding, Ints dilation, int64_t groups, bool needs_x,
                                                              bool needs_weight, bool needs_bias) {
  return cpu_conv_backward("conv_bias_relu_bwd", grad_out, out, x, weight, {stride, padding, dilation, groups}, needs_x,
                           needs_weight, needs_bias);
}

Tensor conv_bias_relu_pack(const Tensor& weight, std::optional<Tensor> bias, Ints stride, Ints dilation) {
  return engine_pack({weight}, {bias}, stride, dilation);
}

Tensor conv_bias_relu_packed_fwd(const Tensor& x, const Tensor& packed, Ints weight_shape,
                                 std::optional<Tensor> residual, Ints stride, Ints padding, Ints dilation, bool relu) {
  return cpu_conv_packed("conv_bias_relu_packed_fwd", x, packed, weight_shape, residual, {stride, padding, dilation, 1},
                         relu);
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("conv_bias_relu_fwd", FUSED_CNN_BOX(&fused_cnn::conv_bias_relu_fwd));
  m.impl("conv_bias_relu_bwd", FUSED_CNN_BOX(&fused_cnn::conv_bias_relu_bwd));
  m.impl("conv_bias_relu_pack", FUSED_CNN_BOX(&fused_cnn::conv_bias_relu_pack));
  m.impl("conv_bias_relu_packed_fwd", FUSED_CNN_BOX(&fused_cnn::conv_bias_relu_packed_fwd));
}
