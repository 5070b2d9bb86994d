// What inception's backends share: the convolutions' places, and the checks of their weights.
#pragma once
#include "shared/aten_conv.h"

namespace fused_cnn {

// The convolutions, by position in weights, biases and channels.
enum { kBranch1, kReduce3, kConv3, kReduce5, kConv5, kPoolProj, kConvolutions };

inline void check_inception(const char* op, const Tensor& x, const std::vector<Tensor>& weights,
                            const std::vector<Tensor>& biases) {
  FUSED_CNN_CHECK(weights.size() == kConvolutions && biases.size() == kConvolutions, op,
                  ": weights and biases must be six each, got ", weights.size(), " and ", biases.size());
  check_4d(op, "x", x);
  for (int i = 0; i < kConvolutions; ++i) {
    check_4d(op, "weight", weights[i]);
    check_like(op, "x", x, "weight", weights[i], /*same_shape=*/false);
    const int64_t in = i == kConv3 ? weights[kReduce3].size(0) : i == kConv5 ? weights[kReduce5].size(0) : x.size(1);
    const int64_t k = weights[i].size(2);
    const bool pointwise = i != kConv3 && i != kConv5;
    FUSED_CNN_CHECK(weights[i].size(1) == in && weights[i].size(3) == k && k % 2 == 1 && (k == 1 || !pointwise), op,
                    ": weight ", i, " must have shape (out, ", in, pointwise ? ", 1, 1)" : ", k, k), k odd", ", got ",
                    shape_of(weights[i]));
    check_channels(op, "bias", biases[i], weights[i].size(0));
    check_like(op, "x", x, "bias", biases[i], /*same_shape=*/false);
  }
}

}  // namespace fused_cnn
