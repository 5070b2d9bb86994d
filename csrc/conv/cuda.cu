// fused_cnn::conv_bias_relu_fwd and _bwd on CUDA. Forward is a kernel of our own where that is faster than the library
// (cuda/gemm/convolve.cuh); the convolution's gradients are cuDNN's, behind one pass for ReLU's mask and the bias's
// gradient.
#include "conv/backward.h"
#include "cuda/gemm/convolve.cuh"

namespace fused_cnn {
namespace {

Tensor conv_bias_relu_fwd(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                          std::optional<Tensor> residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
                          bool relu) {
  const ConvParams params{stride, padding, dilation, groups};
  check_conv("conv_bias_relu_fwd", x, weight, bias, residual, params);
  const Ints kernel{weight.size(2), weight.size(3)};
  const std::array<int64_t, 2> size{conv_out_size(x.size(2), kernel, params, 0),
                                    conv_out_size(x.size(3), kernel, params, 1)};
  const MemoryFormat format = result_format(x);
  if (weight.size(0) == 0) return RowResult(x, 0, size[0], size[1], format).finish();
  if (bias) bias = torch::stable::contiguous(*bias);
  const Tile* tile = tile_of(x, weight, params, residual.has_value(), relu, size, /*own=*/true);
  if (tile && tile->kind == TileKind::library_fused) {
    if (const std::optional<Tensor> out = library_fused(x, weight, bias, params)) return dense(*out, format);
  }
  const bool alone = !bias && !residual && !relu;
  if (alone && (!tile || tile->kind == TileKind::library)) {
    return dense(aten_convolution(x, weight, std::nullopt, params), format);
  }
  const RowResult out(x, weight.size(0), size[0], size[1], format);
  convolve(x, weight, bias, rows_of(residual), params, relu, size, {out, static_cast<int>(weight.size(0))}, tile);
  return out.finish();
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("conv_bias_relu_fwd", FUSED_CNN_BOX(&fused_cnn::conv_bias_relu_fwd));
  m.impl("conv_bias_relu_bwd", FUSED_CNN_BOX(&fused_cnn::conv_bias_relu_bwd));
}
