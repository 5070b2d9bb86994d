// Residual blocks one after the other, as fused_cnn::residual_stage_packed_fwd has them on every device: what the
// arguments say, checked before any memory is touched.
//   block(x) = relu(conv_n(... relu(conv_1(x))) + shortcut(x)),   shortcut of the first block: nothing, x, or a
//   convolution of x; of the later ones: their input
#pragma once
#include <optional>
#include "shared/aten_conv.h"

namespace fused_cnn {

constexpr int64_t kGeometry = 10;  // in and out channels; kernel, stride, padding and dilation, (h, w) each

// One image's channels, height and width.
using ImageSize = std::array<int64_t, 3>;

struct StageConvolution {
  ImageSize in, out;
  Pair kernel;
  ConvParams params;
};

// The convolutions in order, each block's behind the one before it, and the first block's projection.
struct ResidualStage {
  std::vector<StageConvolution> chain;
  std::optional<StageConvolution> projection;
};

// `size` is of the stage's input.
inline ResidualStage checked_stage(const char* op, ImageSize size, int64_t weights, const Ints& geometry,
                                   const Ints& lengths, bool shortcut, bool projects) {
  FUSED_CNN_CHECK(int64_t(geometry.size()) == kGeometry * weights, op, ": ", kGeometry,
                  " values of geometry per packed weight are wanted, got ", geometry.size(), " for ", weights);
  int64_t convolutions = projects;
  for (const int64_t length : lengths) {
    FUSED_CNN_CHECK(length >= 1, op, ": a block must have at least 1 convolution, got ", length);
    convolutions += length;
  }
  FUSED_CNN_CHECK(!lengths.empty() && convolutions == weights, op, ": blocks of ", convolutions,
                  " convolutions in all, the projection among them, need as many packed weights, got ", weights);
  ResidualStage stage;
  stage.chain.reserve(weights);
  // From here on `size` is that of what the next convolution reads.
  const auto of_size = [&](int64_t index) {
    const int64_t* g = &geometry[index * kGeometry];
    FUSED_CNN_CHECK(g[0] == size[0], op, ": a convolution of ", g[0], " channels meets an input of ", size[0]);
    FUSED_CNN_CHECK(g[1] >= 1, op, ": a convolution must have at least 1 channel, got ", g[1]);
    const Pair kernel{g[2], g[3]};
    const ConvParams params{.stride = {g[4], g[5]}, .padding = {g[6], g[7]}, .dilation = {g[8], g[9]}, .groups = 1};
    check_geometry(op, size[1], size[2], kernel, params);
    const ImageSize out{g[1], conv_out_size(size[1], kernel, params, 0), conv_out_size(size[2], kernel, params, 1)};
    FUSED_CNN_CHECK(addressable({out[0], out[1], out[2]}), op, ": an image of ", out[0], " channels and ", out[1],
                    " x ", out[2], " pixels is too large");
    return StageConvolution{size, out, kernel, params};
  };
  if (projects) stage.projection = of_size(weights - 1);
  for (size_t b = 0; b < lengths.size(); ++b) {
    const ImageSize added = b == 0 && projects ? stage.projection->out : size;
    for (int64_t i = 0; i < lengths[b]; ++i) {
      stage.chain.push_back(of_size(static_cast<int64_t>(stage.chain.size())));
      size = stage.chain.back().out;
    }
    FUSED_CNN_CHECK(!(b > 0 || shortcut || projects) || added == size, op, ": the shortcut gives (", added[0], ", ",
                    added[1], ", ", added[2], "), but the convolutions give (", size[0], ", ", size[1], ", ", size[2],
                    ")");
  }
  return stage;
}

}  // namespace fused_cnn
