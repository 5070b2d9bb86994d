// fused_cnn::conv_bias_relu_fwd and _bwd on CUDA. Forward is a kernel of our own where that is faster than the library
// (cuda/convolve.h); the convolution's gradients are cuDNN's, behind one pass for ReLU's mask and the bias's
// gradient.
#include "conv/backward.h"
#include "cuda/convolve.h"

namespace fused_cnn {
namespace {

Tensor conv_bias_relu_fwd(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                          std::optional<Tensor> residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
                          bool relu) {
  const char* op = "conv_bias_relu_fwd";
  const ConvParams params = conv_params(op, stride, padding, dilation, groups);
  check_conv(op, x, weight, bias, residual, params);
  return conv_bias_relu(x, weight, bias, residual, params, relu, result_format(x));
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("conv_bias_relu_fwd", FUSED_CNN_BOX(&fused_cnn::conv_bias_relu_fwd));
  m.impl("conv_bias_relu_bwd", FUSED_CNN_BOX(&fused_cnn::conv_bias_relu_bwd));
}
