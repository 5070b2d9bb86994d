// fused_cnn::max_pool2d_fwd and max_pool2d_bwd on the CPU: out = max over each window, padding -inf, NaN wins, and no
// indices, which PyTorch's own pool writes as eight bytes an element. float32 and bfloat16 run on the engine; the rest
// is PyTorch's pool without its indices.
#include "cpu/conv.h"

namespace fused_cnn {
namespace {

// PyTorch's rule: with ceil_mode a window may reach past the padding, even the first one, but none may start in the
// padding behind the image.
int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode) {
  const int64_t reach = size + 2 * padding - dilation * (kernel - 1) - 1 + (ceil_mode ? stride - 1 : 0);
  if (reach < 0) return 0;
  const int64_t out = reach / stride + 1;
  return ceil_mode && (out - 1) * stride >= size + padding ? out - 1 : out;
}

engine::Window checked_window(const char* op, const Tensor& x, const Ints& kernel, const Ints& stride,
                              const Ints& padding, const Ints& dilation, bool ceil_mode) {
  check_4d(op, "x", x);
  for (const Ints* v : {&kernel, &stride, &padding, &dilation}) {
    FUSED_CNN_CHECK(v->size() == 2, op, ": kernel, stride, padding and dilation must have two values");
  }
  FUSED_CNN_CHECK(x.size(1) >= 1 && x.size(2) >= 1 && x.size(3) >= 1, op,
                  ": x must have a channel and a pixel at least, got ", shape_of(x));
  int64_t size[2];
  for (int i = 0; i < 2; ++i) {
    for (const int64_t value : {kernel[i], stride[i], dilation[i]}) {
      FUSED_CNN_CHECK(value >= 1 && value <= kLargestStep, op,
                      ": kernel, stride and dilation must be at least 1 and less than 2^31, got ", value);
    }
    FUSED_CNN_CHECK(padding[i] >= 0 && padding[i] <= kernel[i] / 2, op,
                    ": padding must be at least 0 and at most half the kernel, got ", padding[i], " for ", kernel[i]);
    size[i] = pooled_size(x.size(i + 2), kernel[i], stride[i], padding[i], dilation[i], ceil_mode);
    FUSED_CNN_CHECK(size[i] >= 1, op, ": no window fits the padded input of shape ", shape_of(x));
  }
  engine::Window window = window_of(sizes_of(x), kernel, {stride, padding, dilation, /*groups=*/1});
  window.out = {size[0], size[1]};
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
