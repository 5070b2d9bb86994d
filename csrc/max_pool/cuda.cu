// fused_cnn::max_pool2d_fwd on CUDA.
#include "cuda/launch.cuh"
#include "cuda/max_pool.h"
#include "max_pool/checks.h"

namespace fused_cnn {
namespace {

Tensor max_pool2d_fwd(const Tensor& x, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil_mode) {
  const char* op = "max_pool2d_fwd";
  const auto [height, width] = checked_pool(op, x, kernel, stride, padding, dilation, ceil_mode);
  const RowResult out(x, x.size(1), height, width, result_format(x));
  const auto pair = [](const Ints& of) { return std::array{static_cast<int>(of[0]), static_cast<int>(of[1])}; };
  if (out.tensor.numel() > 0) {
    max_pool(x, rows_of(x), out.tensor, {pair(kernel), pair(stride), pair(padding), pair(dilation)});
  }
  return out.finish();
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("max_pool2d_fwd", FUSED_CNN_BOX(&fused_cnn::max_pool2d_fwd));
}
