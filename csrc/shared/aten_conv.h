// PyTorch's (ATen's) convolution, its gradients and max pool, called through the dispatcher: oneDNN runs the
// convolutions on the CPU, cuDNN on CUDA. And the checks of a convolution's arguments.
#pragma once
#include <optional>
#include <tuple>
#include <vector>
#include "shared/checks.h"

namespace fused_cnn {

using Ints = std::vector<int64_t>;
using Pair = std::array<int64_t, 2>;  // (h, w); not on the heap, for a network's call has hundreds

struct ConvParams {
  Pair stride, padding, dilation;
  int64_t groups;
};

inline Pair pair_of(const char* op, const char* name, const Ints& values) {
  FUSED_CNN_CHECK(values.size() == 2, op, ": ", name, " must have two values, got ", values.size());
  return {values[0], values[1]};
}

inline ConvParams conv_params(const char* op, const Ints& stride, const Ints& padding, const Ints& dilation,
                              int64_t groups) {
  return {pair_of(op, "stride", stride), pair_of(op, "padding", padding), pair_of(op, "dilation", dilation), groups};
}

// As PyTorch's operators take it.
inline auto list_of(const Pair& pair) {
  return torch::headeronly::HeaderOnlyArrayRef<int64_t>(pair.data(), pair.size());
}

inline constexpr Pair kNoPadding{0, 0};
constexpr int64_t kLargestStep = (int64_t{1} << 31) - 1;  // of a window: sums and products of two do not overflow

inline int64_t conv_out_size(int64_t size, const Pair& kernel, const ConvParams& p, int axis) {
  const int64_t reach = p.dilation[axis] * (kernel[axis] - 1) + 1, padded = size + 2 * p.padding[axis];
  return padded < reach ? 0 : (padded - reach) / p.stride[axis] + 1;  // C++ division rounds towards zero
}

inline void check_geometry(const char* op, int64_t height, int64_t width, const Pair& kernel, const ConvParams& p) {
  for (int axis = 0; axis < 2; ++axis) {
    FUSED_CNN_CHECK(p.stride[axis] >= 1 && p.dilation[axis] >= 1 && p.padding[axis] >= 0, op,
                    ": stride and dilation must be at least 1 and padding at least 0");
    for (const int64_t value : {kernel[axis], p.stride[axis], p.padding[axis], p.dilation[axis]}) {
      FUSED_CNN_CHECK(value <= kLargestStep, op, ": kernel, stride, padding and dilation must be less than 2^31, got ",
                      value);
    }
    FUSED_CNN_CHECK(kernel[axis] >= 1 && conv_out_size(axis == 0 ? height : width, kernel, p, axis) >= 1, op,
                    ": kernel (", kernel[0], ", ", kernel[1], ") is larger than the padded input of size (", height,
                    ", ", width, ")");
  }
}

// Every condition under which a convolution's pointers may be used; the shape of weight is (out, in / groups, kh, kw).
inline void check_conv(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, const ConvParams& p) {
  check_4d(op, "x", x);
  check_4d(op, "weight", weight);
  check_like(op, "x", x, "weight", weight, /*same_shape=*/false);
  FUSED_CNN_CHECK(p.groups >= 1 && weight.size(0) % p.groups == 0 && x.size(1) % p.groups == 0 &&
                      weight.size(1) == x.size(1) / p.groups,
                  op, ": x has ", x.size(1), " channels; a weight of shape ", shape_of(weight),
                  " with groups=", p.groups, " needs its own ", weight.size(1), " for each group");
  const Pair kernel{weight.size(2), weight.size(3)};
  check_geometry(op, x.size(2), x.size(3), kernel, p);
  if (bias) {
    check_channels(op, "bias", *bias, weight.size(0));
    check_like(op, "x", x, "bias", *bias, /*same_shape=*/false);
  }
  if (residual) {
    check_result_shape(op, "residual", *residual, x, weight.size(0), conv_out_size(x.size(2), kernel, p, 0),
                       conv_out_size(x.size(3), kernel, p, 1));
  }
}

// Those with which a result has the input's size.
inline ConvParams same_padding(int64_t kernel) {
  return {{1, 1}, {kernel / 2, kernel / 2}, {1, 1}, 1};
}

// A tensor as cuDNN may have it: it was seen to read tensors of any address 16 bytes at a time (float32 weight
// gradients, on an H200); so what does not lie on 16 bytes is copied.
inline Tensor aligned_for_cudnn(const Tensor& t) {
#ifdef USE_CUDA
  if (reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 != 0) return torch::stable::clone(t);
#endif
  return t;
}

inline Tensor aten_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                               const ConvParams& p) {
  const auto found =
      call_operator("aten::convolution", "", aligned_for_cudnn(x), aligned_for_cudnn(weight), bias, list_of(p.stride),
                    list_of(p.padding), list_of(p.dilation), /*transposed=*/false, list_of(kNoPadding), p.groups);
  Tensor y = torch::stable::detail::to<Tensor>(found[0]);
  FUSED_CNN_CHECK(y.scalar_type() == x.scalar_type(), "ATen's convolution of ",
                  torch::headeronly::toString(x.scalar_type()), " gave ", torch::headeronly::toString(y.scalar_type()),
                  ": autocast must be off around this op");
  return y;
}

// (grad_x, grad_weight); one that is not needed is undefined.
inline std::tuple<Tensor, Tensor> aten_convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                            const ConvParams& p, bool needs_x, bool needs_weight) {
  using torch::stable::detail::to;
  const bool needs[] = {needs_x, needs_weight, /*bias=*/false};
  const auto found = call_operator("aten::convolution_backward", "", aligned_for_cudnn(grad), aligned_for_cudnn(x),
                                   aligned_for_cudnn(weight), /*bias_sizes=*/std::optional<Ints>(), list_of(p.stride),
                                   list_of(p.padding), list_of(p.dilation), /*transposed=*/false, list_of(kNoPadding),
                                   p.groups, torch::headeronly::HeaderOnlyArrayRef<bool>(needs, 3));
  Tensor grad_x = to<Tensor>(found[0]), grad_weight = to<Tensor>(found[1]), grad_bias = to<Tensor>(found[2]);
  return {grad_x, grad_weight};
}

inline Tensor aten_max_pool2d(const Tensor& x, const Ints& kernel, const Ints& stride, const Ints& padding,
                              const Ints& dilation, bool ceil_mode) {
  return torch::stable::detail::to<Tensor>(
      call_operator("aten::max_pool2d", "", aligned_for_cudnn(x), kernel, stride, padding, dilation, ceil_mode)[0]);
}

}  // namespace fused_cnn
