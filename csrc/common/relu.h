// ReLU as PyTorch defines it, shared by every backend in C++: NaN propagates, the gradient at 0 is 0, and the gradient
// passes where the output is NaN.
#pragma once
#include "common/dtype.h"

namespace fused_cnn {

template <typename C>
FUSED_CNN_HD C relu(C v) {
  return v <= C(0) ? C(0) : v;
}

template <typename C>
FUSED_CNN_HD C relu_grad(C grad, C out) {
  return out <= C(0) ? C(0) : grad;
}

}  // namespace fused_cnn
