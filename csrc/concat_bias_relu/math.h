// out = relu(x + bias) in the branch's channels; the gradient of x is grad_out where out > 0 or out is NaN,
// else 0, and the bias's is its sum over rows. C is float, double, or a compiler vector of them.
#pragma once
#include "common/relu.h"

namespace fused_cnn::concat_bias_relu {

template <typename C>
FUSED_CNN_HD C forward(C x, C bias) {
  return relu(x + bias);
}

template <typename C>
FUSED_CNN_HD C backward(C grad_out, C out) {
  return relu_grad(grad_out, out);
}

}  // namespace fused_cnn::concat_bias_relu
