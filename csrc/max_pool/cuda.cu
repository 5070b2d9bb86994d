// fused_cnn::max_pool2d_fwd, max_pool2d_index_fwd and max_pool2d_index_bwd on CUDA.
#include "cuda/launch.cuh"
#include "cuda/max_pool.h"
#include "max_pool/checks.h"

namespace fused_cnn {
namespace {

PoolWindow window_of(const Pool& pool) {
  const auto pair = [](const Pair& of) { return std::array{static_cast<int>(of[0]), static_cast<int>(of[1])}; };
  return {pair(pool.kernel), pair(pool.stride), pair(pool.padding), pair(pool.dilation)};
}

Tensor max_pool2d_fwd(const Tensor& x, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil_mode) {
  const char* op = "max_pool2d_fwd";
  const Pool pool = pool_of(op, kernel, stride, padding, dilation, ceil_mode);
  const auto [height, width] = checked_pool(op, x, pool);
  const RowResult out(x, x.size(1), height, width, result_format(x));
  if (out.tensor.numel() > 0) max_pool(x, rows_of(x), out.tensor, window_of(pool));
  return out.finish();
}

Tensor empty_index(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  const int64_t sizes[] = {like.size(0), channels, height, width};
  return torch::stable::empty(sizes, ScalarType::Byte, torch::headeronly::Layout::Strided, like.device(), std::nullopt,
                              MemoryFormat::ChannelsLast);
}

std::tuple<Tensor, Tensor> max_pool2d_index_fwd(const Tensor& x, Ints kernel, Ints stride, Ints padding, Ints dilation,
                                                bool ceil_mode) {
  const char* op = "max_pool2d_index_fwd";
  const Pool pool = pool_of(op, kernel, stride, padding, dilation, ceil_mode);
  const auto [height, width] = checked_pool(op, x, pool);
  const PoolWindow window = window_of(pool);
  FUSED_CNN_CHECK(kernel[0] * kernel[1] <= kMostTaps, op, ": a window must have at most ", kMostTaps, " pixels, got ",
                  kernel[0], " x ", kernel[1]);
  const RowResult out(x, x.size(1), height, width, result_format(x));
  const Tensor index = empty_index(x, x.size(1), height, width);
  if (out.tensor.numel() > 0) {
    max_pool(x, rows_of(x), out.tensor, window, static_cast<uint8_t*>(index.data_ptr()));
  }
  return {out.finish(), index};
}

Tensor max_pool2d_index_bwd(const Tensor& grad_out, const Tensor& index, Ints size, Ints kernel, Ints stride,
                            Ints padding, Ints dilation, bool ceil_mode) {
  const char* op = "max_pool2d_index_bwd";
  check_4d(op, "grad_out", grad_out);
  check_4d(op, "index", index);
  FUSED_CNN_CHECK(size.size() == 2, op, ": size must have two values");
  const Pool pool = pool_of(op, kernel, stride, padding, dilation, ceil_mode);
  const auto [height, width] = checked_pool(op, {grad_out.size(1), size[0], size[1]}, pool);
  FUSED_CNN_CHECK(grad_out.size(2) == height && grad_out.size(3) == width, op, ": the pool of ", size[0], " x ",
                  size[1], " pixels has ", height, " x ", width, ", got grad_out ", shape_of(grad_out));
  bool same = index.scalar_type() == ScalarType::Byte && index.get_device_index() == grad_out.get_device_index();
  for (int i = 0; i < 4; ++i) same &= index.size(i) == grad_out.size(i);
  FUSED_CNN_CHECK(same, op, ": index must be bytes of the shape and on the device of grad_out, got ", shape_of(index),
                  " of ", torch::headeronly::toString(index.scalar_type()), " for ", shape_of(grad_out));
  const RowResult grad_x(grad_out, grad_out.size(1), size[0], size[1], result_format(grad_out));
  if (grad_x.tensor.numel() == 0) return grad_x.finish();
  if (grad_out.numel() == 0) return torch::stable::fill_(grad_x.tensor, 0.0);
  const Tensor places = dense(index, MemoryFormat::ChannelsLast);
  max_pool_gradient(grad_out, static_cast<const uint8_t*>(places.data_ptr()), grad_x.tensor, window_of(pool));
  return grad_x.finish();
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("max_pool2d_fwd", FUSED_CNN_BOX(&fused_cnn::max_pool2d_fwd));
  m.impl("max_pool2d_index_fwd", FUSED_CNN_BOX(&fused_cnn::max_pool2d_index_fwd));
  m.impl("max_pool2d_index_bwd", FUSED_CNN_BOX(&fused_cnn::max_pool2d_index_bwd));
}
