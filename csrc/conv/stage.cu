// fused_cnn::residual_stage_packed_fwd on CUDA (residual_stage.h): one dispatch launches the kernels of all blocks, so
// that the host, which needs longer for a call than the GPU for a small layer, is asked once.
#include "conv/residual_stage.h"
#include "cuda/convolve.h"

namespace fused_cnn {
namespace {

// `packed` is each convolution's weight (out, in, kh, kw), channels_last, and its bias, which is empty where there is
// none.
Tensor residual_stage_packed_fwd(const Tensor& x, std::vector<Tensor> packed, Ints geometry, Ints lengths,
                                 bool shortcut, bool projects) {
  const char* op = "residual_stage_packed_fwd";
  FUSED_CNN_CHECK(packed.size() % 2 == 0, op, ": a weight and a bias of each convolution are wanted, got ",
                  packed.size(), " tensors");
  check_4d(op, "x", x);
  const ResidualStage stage =
      checked_stage(op, {x.size(1), x.size(2), x.size(3)}, packed.size() / 2, geometry, lengths, shortcut, projects);
  const auto check = [&](const StageConvolution& c, size_t index) {
    const Tensor &weight = packed[2 * index], &bias = packed[2 * index + 1];
    check_4d(op, "packed weight", weight);
    check_like(op, "x", x, "packed weight", weight, /*same_shape=*/false);
    FUSED_CNN_CHECK(weight.size(0) == c.out[0] && weight.size(1) == c.in[0] && weight.size(2) == c.kernel[0] &&
                        weight.size(3) == c.kernel[1],
                    op, ": packed weight ", index, " must have shape (", c.out[0], ", ", c.in[0], ", ", c.kernel[0],
                    ", ", c.kernel[1], "), got ", shape_of(weight));
    check_like(op, "x", x, "packed bias", bias, /*same_shape=*/false);
    if (bias.numel() > 0) check_channels(op, "packed bias", bias, c.out[0]);
  };
  for (size_t i = 0; i < stage.chain.size(); ++i) check(stage.chain[i], i);
  if (projects) check(*stage.projection, stage.chain.size());

  const MemoryFormat format = result_format(x);
  const ImageSize& size = stage.chain.back().out;
  if (x.size(0) * size[0] * size[1] * size[2] == 0) return empty_nchw(x, size[0], size[1], size[2], format);
  const auto run = [&](const StageConvolution& c, size_t index, const Tensor& from,
                       const std::optional<Tensor>& residual, bool relu,
                       MemoryFormat of_result = MemoryFormat::ChannelsLast) {
    std::optional<Tensor> bias;
    if (packed[2 * index + 1].numel() > 0) bias = packed[2 * index + 1];
    return conv_bias_relu(from, packed[2 * index], bias, residual, c.params, relu, of_result);
  };
  Tensor input = rows_of(x).tensor;  // of other layouts one copy, not one for each reader
  size_t next = 0;
  for (size_t b = 0; b < lengths.size(); ++b) {
    Tensor y = input;
    for (const size_t last = next + lengths[b] - 1; next < last; ++next) {
      y = run(stage.chain[next], next, y, std::nullopt, /*relu=*/true);
    }
    std::optional<Tensor> added;
    if (b == 0 && projects) {
      added = run(*stage.projection, stage.chain.size(), input, std::nullopt, /*relu=*/false);
    } else if (b > 0 || shortcut) {
      added = input;
    }
    const bool is_last = b + 1 == lengths.size();
    input = run(stage.chain[next], next, y, added, /*relu=*/true, is_last ? format : MemoryFormat::ChannelsLast);
    ++next;
  }
  return input;
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("residual_stage_packed_fwd", FUSED_CNN_BOX(&fused_cnn::residual_stage_packed_fwd));
}
