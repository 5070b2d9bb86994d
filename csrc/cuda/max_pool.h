// Max pooling over rows of channels, without indices: out = max over each window, padding -inf, NaN wins.
#pragma once
#include <array>
#include "shared/rows.h"

namespace fused_cnn {

struct PoolWindow {
  std::array<int, 2> kernel, stride, padding, dilation;
};

// x's rows pooled into out's, (N, C, H', W').
void max_pool(const Tensor& x, const RowView& in, const Tensor& out, const PoolWindow& window);

}  // namespace fused_cnn
