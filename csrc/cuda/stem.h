// The stem of a network in one kernel: a 7x7 convolution of stride 2 over at most three channels, bias, ReLU, and,
// where it is asked for, a 3x3 max pool of stride 2 (cuda/stem.cu).
#pragma once
#include <optional>
#include "cuda/gemm/tiles.h"
#include "shared/aten_conv.h"
#include "shared/rows.h"

namespace fused_cnn {

constexpr int kStemPoolKernel = 3, kStemPoolStride = 2;

struct StemPool {
  int padding;
  int64_t height, width;  // of the pool's result
};

// relu(convolution + bias), or the pool of it, which is then under ReLU, into rows; `size` is the convolution's
// (height, width), and padding less than the kernel. x and weight are of a 16-bit type and of any strides, bias is
// contiguous, the outputs and the distance of rows are multiples of 8.
void run_stem(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Pair& padding, bool relu,
              const std::array<int64_t, 2>& size, const std::optional<StemPool>& pool, const Rows& out);

}  // namespace fused_cnn
