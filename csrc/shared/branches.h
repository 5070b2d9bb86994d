// Activations as loops and kernels on both devices see them, and what a pass over rows of channels does to each branch
// of a concatenation. No torch header: this file is compiled once per instruction set (cpu/level.h) and by nvcc.
#pragma once
#include "shared/dtype.h"

namespace fused_cnn {

// Rows (pixels) of adjacent channels, `pitch` elements apart; data is null where there are none.
struct Rows {
  void* data = nullptr;
  int64_t pitch = 0;

  template <typename T>
  FUSED_CNN_HD T* at(int64_t row) const {
    return static_cast<T*>(data) + row * pitch;
  }
};

// out = y + bias + residual, under ReLU where that is asked for; bias and residual may be null, and out may be y.
struct BiasResidualRelu {
  Rows y;
  const void* bias = nullptr;
  Rows residual = {}, out;
  int64_t channels;
};

// A branch of drelu_bgrad: grad = grad_out where out > 0 or NaN (everywhere where `out` is null), and its sum over the
// rows for each channel. `grad` has rows of `channels`, or is null where the sums alone are wanted; `first` is the
// branch's place among the channels of grad_out and out.
struct DreluBranch {
  void* grad;
  int64_t channels, first;
};

}  // namespace fused_cnn
