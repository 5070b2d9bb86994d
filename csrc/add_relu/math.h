// out = relu(x + residual); grad_x = grad_residual = grad_out where out > 0 or out is NaN, else 0.
#pragma once
#include "shared/relu.h"

namespace fused_cnn::add_relu {

template <typename C>
FUSED_CNN_HD C forward(C x, C residual) {
  return relu(x + residual);
}

template <typename C>
FUSED_CNN_HD C backward(C grad_out, C out) {
  return relu_grad(grad_out, out);
}

}  // namespace fused_cnn::add_relu
