// ReLU as PyTorch defines it, shared by every backend in C++: NaN propagates, the gradient at 0 is 0, and the gradient
// passes where the output is NaN. C is float, double, or a compiler vector of them (cpu/simd.h).
#pragma once
#include "shared/dtype.h"

namespace fused_cnn {

template <typename C>
FUSED_CNN_HD C relu(C v) {
  return v <= C{} ? C{} : v;
}

template <typename C>
FUSED_CNN_HD C relu_grad(C grad, C out) {
  return out <= C{} ? C{} : grad;
}

}  // namespace fused_cnn
