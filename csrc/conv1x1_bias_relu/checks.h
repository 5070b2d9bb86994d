// What conv1x1_bias_relu's backends check alike.
#pragma once
#include "common/library_conv.h"

namespace fused_cnn {

inline ConvParams pointwise_params(const Ints& stride) {
  return {stride, {0, 0}, {1, 1}, 1};
}

inline void check_1x1(const char* op, const Tensor& weight) {
  check_4d(op, "weight", weight);
  FUSED_CNN_CHECK(weight.size(2) == 1 && weight.size(3) == 1, op, ": weight must have a 1x1 kernel, got ",
                  shape_of(weight));
}

}  // namespace fused_cnn
