// Batch normalisation and its gradient for one element (Ioffe & Szegedy, arXiv 1502.03167, algorithm 1 and
// section 3).
//   y = (x - mean) * scale + bias, scale = rstd * weight
//   grad_x = (g - mean(g) - (x - mean) * rstd^2 * mean(g (x - mean))) * scale with batch statistics, g * scale with
//   running ones
// C is float, double, or a compiler vector of them. Forward and backward share normalize(), so a recomputed ReLU mask
// is the mask.
#pragma once
#include "shared/relu.h"

namespace fused_cnn::batch_norm {

template <typename C>
FUSED_CNN_HD C normalize(C x, C mean, C scale, C bias) {
  return (x - mean) * scale + bias;
}

// `offset` is mean(g), `slope` is rstd^2 * mean(g (x - mean)).
template <typename C>
FUSED_CNN_HD C grad_input(C g, C x, C mean, C scale, C offset, C slope) {
  return (g - offset - (x - mean) * slope) * scale;
}

// Moments of a sample of size n, as count, mean and sum of squared differences (m2), merged with another's (Chan, Golub
// and LeVeque, 1979). `share` is other_n / (n + other_n) and `product` is n * other_n / (n + other_n).
template <typename C>
FUSED_CNN_HD void merge_moments(C& mean, C& m2, C other_mean, C other_m2, C share, C product) {
  const C delta = other_mean - mean;
  mean = mean + delta * share;
  m2 = m2 + other_m2 + delta * delta * product;
}

}  // namespace fused_cnn::batch_norm

namespace fused_cnn {

// Bytes of a row of ReLU's mask: one bit a channel.
FUSED_CNN_HD int64_t mask_bytes(int64_t channels) {
  return (channels + 7) / 8;
}

}  // namespace fused_cnn
