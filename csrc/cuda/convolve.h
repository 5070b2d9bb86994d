// Convolutions with what follows them, into one slice of rows or a tensor: the 1x1 product, the implicit product, a
// network's first convolution, or the library's convolution and one pass.
#pragma once
#include "cuda/pointwise.h"

namespace fused_cnn {

inline std::array<int64_t, 2> size_of_result(const Tensor& x, const Tensor& weight, const ConvParams& params) {
  const Pair kernel{weight.size(2), weight.size(3)};
  return {conv_out_size(x.size(2), kernel, params, 0), conv_out_size(x.size(3), kernel, params, 1)};
}

// How a convolution into one slice runs; null: by the library and one pass. `own` says that its result is a tensor of
// its own; with `pooled` it is how the convolution and the pool behind it run.
const Tile* tile_of(const Tensor& x, const Tensor& weight, const ConvParams& params, bool residual, bool relu,
                    const std::array<int64_t, 2>& size, bool own, bool pooled = false);

// relu(convolution + bias + residual), (N, out, H', W'), into rows, with the tile that tile_of found; `size` is
// (H', W').
void convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const RowView& residual,
              const ConvParams& params, bool relu, const std::array<int64_t, 2>& size, const GemmSlice& out,
              const Tile* tile);

// relu(convolution + bias + residual) as a tensor of this format.
Tensor conv_bias_relu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                      const std::optional<Tensor>& residual, const ConvParams& params, bool relu, MemoryFormat format);

}  // namespace fused_cnn
