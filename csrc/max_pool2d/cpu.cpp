// fused_cnn::max_pool2d_fwd on the CPU: out = max over each window, padding -inf, NaN wins, and no indices, which the
// library writes as eight bytes an element. float32 and bfloat16 run on the engine; the rest is the library's pool
// without its indices.
#include "common/cpu_conv.h"

namespace fused_cnn {
namespace {

// PyTorch's rule: with ceil_mode, no window may start in the padding behind the image.
int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode) {
  const int64_t reach = size + 2 * padding - dilation * (kernel - 1) - 1;
  if (reach < 0) return 0;
  const int64_t out = (reach + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  return ceil_mode && (out - 1) * stride >= size + padding ? out - 1 : out;
}

Tensor max_pool2d_fwd(const Tensor& x, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil_mode) {
  const char* op = "max_pool2d_fwd";
  check_4d(op, "x", x);
  for (const Ints* v : {&kernel, &stride, &padding, &dilation}) {
    FUSED_CNN_CHECK(v->size() == 2, op, ": kernel, stride, padding and dilation must have two values");
  }
  int64_t size[2];
  for (int i = 0; i < 2; ++i) {
    FUSED_CNN_CHECK(kernel[i] >= 1 && stride[i] >= 1 && dilation[i] >= 1, op,
                    ": kernel, stride and dilation must be at least 1");
    FUSED_CNN_CHECK(padding[i] >= 0 && 2 * padding[i] <= kernel[i], op,
                    ": padding must be at least 0 and at most half the kernel, got ", padding[i], " for ", kernel[i]);
    size[i] = pooled_size(x.size(i + 2), kernel[i], stride[i], padding[i], dilation[i], ceil_mode);
    FUSED_CNN_CHECK(size[i] >= 1, op, ": the window is larger than the padded input of shape ", shape_of(x));
  }
  if (x.scalar_type() != ScalarType::Float && x.scalar_type() != ScalarType::BFloat16) {
    return dense(library_max_pool2d(x, kernel, stride, padding, dilation, ceil_mode), result_format(x));
  }
  Tensor out = empty_nchw(x, x.size(1), size[0], size[1], MemoryFormat::ChannelsLast);
  if (out.numel() > 0) {
    const Pixels in(x);
    const engine::PoolShape shape{x.size(0), x.size(1),  x.size(2),  x.size(3),   kernel[0],   kernel[1], stride[0],
                                  stride[1], padding[0], padding[1], dilation[0], dilation[1], size[0],   size[1]};
    engine::max_pool(shape, engine_dtype(x), in.data(), in.pitch, out.data_ptr(), x.size(1), engine_threads());
  }
  return dense(out, result_format(x));
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("max_pool2d_fwd", TORCH_BOX(&fused_cnn::max_pool2d_fwd));
}
