// fused_cnn::stem_fwd on CUDA: a convolution, bias, ReLU and the 3x3 max pool of stride 2 behind it, in one kernel
// where that is faster than two (cuda/stem.h).
#include "cuda/convolve.h"
#include "cuda/max_pool.h"
#include "cuda/stem.h"
#include "max_pool/checks.h"

namespace fused_cnn {
namespace {

Tensor stem_fwd(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, Ints stride, Ints padding,
                int64_t pool_padding, bool ceil_mode) {
  const char* op = "stem_fwd";
  const ConvParams params = conv_params(op, stride, padding, /*dilation=*/{1, 1}, /*groups=*/1);
  check_conv(op, x, weight, bias, std::nullopt, params);
  const std::array<int64_t, 2> size = size_of_result(x, weight, params);
  const Pool pool{.kernel = {kStemPoolKernel, kStemPoolKernel},
                  .stride = {kStemPoolStride, kStemPoolStride},
                  .padding = {pool_padding, pool_padding},
                  .dilation = {1, 1},
                  .ceil_mode = ceil_mode};
  const auto [height, width] = checked_pool(op, {weight.size(0), size[0], size[1]}, pool);
  const RowResult out(x, weight.size(0), height, width, result_format(x));
  if (out.tensor.numel() == 0) return out.finish();
  const int pad = static_cast<int>(pool_padding);
  const Tile* tile = tile_of(x, weight, params, /*residual=*/false, /*relu=*/true, size, /*own=*/true, /*pooled=*/true);
  if (tile && tile->kind == TileKind::stem) {
    if (bias) bias = dense_vector(*bias);
    run_stem(x, weight, bias, params.padding, /*relu=*/true, size, StemPool{pad, height, width}, out);
  } else {
    const Tensor y = conv_bias_relu(x, weight, bias, std::nullopt, params, /*relu=*/true, MemoryFormat::ChannelsLast);
    const std::array kernel{kStemPoolKernel, kStemPoolKernel}, stride{kStemPoolStride, kStemPoolStride};
    max_pool(y, rows_of(y), out.tensor,
             {.kernel = kernel, .stride = stride, .padding = {pad, pad}, .dilation = {1, 1}});
  }
  return out.finish();
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("stem_fwd", FUSED_CNN_BOX(&fused_cnn::stem_fwd));
}
