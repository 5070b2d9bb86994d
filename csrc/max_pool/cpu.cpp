// fused_cnn::max_pool2d_fwd and max_pool2d_bwd on the CPU: out = max over each window, padding -inf, NaN wins, and no
// indices, which PyTorch's own pool writes as eight bytes an element. float32 and bfloat16 run on the engine; the rest
// is PyTorch's pool without its indices.
#include "cpu/conv.h"
#include "max_pool/checks.h"

namespace fused_cnn {
namespace {

engine::Window checked_window(const char* op, const Tensor& x, const Ints& kernel, const Ints& stride,
                              const Ints& padding, const Ints& dilation, bool ceil_mode) {
  const Pool pool = pool_of(op, kernel, stride, padding, dilation, ceil_mode);
  const auto [height, width] = checked_pool(op, x, pool);
  engine::Window window = window_of(sizes_of(x), pool.kernel, {pool.stride, pool.padding, pool.dilation, /*groups=*/1});
  window.out = {height, width};
  return window;
}

Tensor max_pool2d_fwd(const Tensor& x, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil_mode) {
  const char* op = "max_pool2d_fwd";
  const engine::Window window = checked_window(op, x, kernel, stride, padding, dilation, ceil_mode);
  if (!engine_supports(x)) {
    return dense(aten_max_pool2d(x, kernel, stride, padding, dilation, ceil_mode), result_format(x));
  }
  const Tensor out = empty_result(x, window.C, window.out.h, window.out.w);
  if (out.numel() > 0) engine::max_pool(window, engine_dtype(op, x), rows_of(x), out.data_ptr());
  return dense(out, result_format(x));
}

Tensor max_pool2d_bwd(const Tensor& grad_out, const Tensor& x, Ints kernel, Ints stride, Ints padding, Ints dilation,
                      bool ceil_mode) {
  const char* op = "max_pool2d_bwd";
  const engine::Window window = checked_window(op, x, kernel, stride, padding, dilation, ceil_mode);
  const DType dtype = engine_dtype(op, x);
  check_result_shape(op, "grad_out", grad_out, x, window.C, window.out.h, window.out.w);
  const Tensor grad_x = empty_like_4d(x, MemoryFormat::ChannelsLast);
  const Tensor dense_grad = dense(grad_out, MemoryFormat::ChannelsLast);
  if (grad_x.numel() > 0)
    engine::max_pool_backward(window, dtype, rows_of(x), dense_grad.data_ptr(), grad_x.data_ptr());
  return dense(grad_x, result_format(x));
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("max_pool2d_fwd", FUSED_CNN_BOX(&fused_cnn::max_pool2d_fwd));
  m.impl("max_pool2d_bwd", FUSED_CNN_BOX(&fused_cnn::max_pool2d_bwd));
}
