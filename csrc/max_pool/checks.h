// What both devices check of a max pool, and the size of its result.
#pragma once
#include <array>
#include "shared/aten_conv.h"

namespace fused_cnn {

// PyTorch's rule: with ceil_mode a window may reach past the padding, even the first one, but none may start in the
// padding behind the image.
inline int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                           bool ceil_mode) {
  const int64_t reach = size + 2 * padding - dilation * (kernel - 1) - 1 + (ceil_mode ? stride - 1 : 0);
  if (reach < 0) return 0;
  const int64_t out = reach / stride + 1;
  return ceil_mode && (out - 1) * stride >= size + padding ? out - 1 : out;
}

struct Pool {
  Pair kernel, stride, padding, dilation;
  bool ceil_mode;
};

inline Pool pool_of(const char* op, const Ints& kernel, const Ints& stride, const Ints& padding, const Ints& dilation,
                    bool ceil_mode) {
  return {pair_of(op, "kernel", kernel), pair_of(op, "stride", stride), pair_of(op, "padding", padding),
          pair_of(op, "dilation", dilation), ceil_mode};
}

// The result's (height, width), of x with so many channels and so high and wide.
inline Pair checked_pool(const char* op, const std::array<int64_t, 3>& x, const Pool& pool) {
  const auto& [kernel, stride, padding, dilation, ceil_mode] = pool;
  FUSED_CNN_CHECK(x[0] >= 1 && x[1] >= 1 && x[2] >= 1, op, ": x must have a channel and a pixel at least, got (", x[0],
                  ", ", x[1], ", ", x[2], ")");
  Pair size;
  for (int i = 0; i < 2; ++i) {
    for (const int64_t value : {kernel[i], stride[i], dilation[i]}) {
      FUSED_CNN_CHECK(value >= 1 && value <= kLargestStep, op,
                      ": kernel, stride and dilation must be at least 1 and less than 2^31, got ", value);
    }
    FUSED_CNN_CHECK(padding[i] >= 0 && padding[i] <= kernel[i] / 2, op,
                    ": padding must be at least 0 and at most half the kernel, got ", padding[i], " for ", kernel[i]);
    size[i] = pooled_size(x[i + 1], kernel[i], stride[i], padding[i], dilation[i], ceil_mode);
    FUSED_CNN_CHECK(size[i] >= 1, op, ": no window fits the padded input of shape (", x[0], ", ", x[1], ", ", x[2],
                    ")");
  }
  return size;
}

inline Pair checked_pool(const char* op, const Tensor& x, const Pool& pool) {
  check_4d(op, "x", x);
  return checked_pool(op, {x.size(1), x.size(2), x.size(3)}, pool);
}

}  // namespace fused_cnn
