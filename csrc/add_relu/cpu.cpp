// fused_cnn::add_relu_fwd and add_relu_bwd on the CPU: check, bring both inputs to one dense layout, run the loop on
// every thread.
#include "add_relu/cpu_kernels.h"
#include "shared/checks.h"
#include "cpu/parallel.h"

namespace fused_cnn {
namespace {

using Loop = void (*)(DType, const void*, const void*, void*, int64_t);

Tensor elementwise(DType dtype, const Tensor& a, const Tensor& b, Loop loop) {
  const MemoryFormat format = result_format(a);
  const Tensor dense_a = dense(a, format), dense_b = dense(b, format);
  Tensor out = empty_like_4d(a, format);
  const void *pa = dense_a.data_ptr(), *pb = dense_b.data_ptr();
  void* po = out.data_ptr();
  const int64_t size = a.element_size();
  parallel_elements(a.numel(), [&](int64_t begin, int64_t end) {
    loop(dtype, at(pa, begin, size), at(pb, begin, size), at(po, begin, size), end - begin);
  });
  return out;
}

Tensor add_relu_fwd(const Tensor& x, const Tensor& residual) {
  check_4d("add_relu_fwd", "x", x);
  check_like("add_relu_fwd", "x", x, "residual", residual);
  return elementwise(dtype_of("add_relu_fwd", "x", x), x, residual, FUSED_CNN_PICK(add_relu_fwd));
}

Tensor add_relu_bwd(const Tensor& grad_out, const Tensor& out) {
  check_4d("add_relu_bwd", "grad_out", grad_out);
  check_like("add_relu_bwd", "grad_out", grad_out, "out", out);
  // The gradient takes out's layout: grad_out may be a slice of a concatenation's gradient, or expanded.
  const MemoryFormat format = result_format(out);
  return elementwise(dtype_of("add_relu_bwd", "grad_out", grad_out), dense(grad_out, format), out,
                     FUSED_CNN_PICK(add_relu_bwd));
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("add_relu_fwd", FUSED_CNN_BOX(&fused_cnn::add_relu_fwd));
  m.impl("add_relu_bwd", FUSED_CNN_BOX(&fused_cnn::add_relu_bwd));
}
