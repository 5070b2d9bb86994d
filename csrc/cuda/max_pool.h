// Max pooling over rows of channels: out = max over each window, padding -inf, NaN wins. Without PyTorch's int64
// indices: where a gradient will be asked for, a byte says which of the window's taps, row by row, the maximum is.
#pragma once
#include <array>
#include "shared/rows.h"

namespace fused_cnn {

struct PoolWindow {
  std::array<int, 2> kernel, stride, padding, dilation;

  int taps() const { return kernel[0] * kernel[1]; }
};

constexpr int kMostTaps = 255;  // of a window whose places are bytes

// x's rows pooled into out's, (N, C, H', W'), and, where it is not null, the places into `index`, which has rows of C.
void max_pool(const Tensor& x, const RowView& in, const Tensor& out, const PoolWindow& window,
              uint8_t* index = nullptr);

// The gradient of x, (N, C, H, W), whose rows grad_x has: of each pixel the sum of grad_out over the windows whose
// place it is.
void max_pool_gradient(const Tensor& grad_out, const uint8_t* index, const Tensor& grad_x, const PoolWindow& window);

}  // namespace fused_cnn
