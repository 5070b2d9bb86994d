// fused_cnn::add_relu_fwd and add_relu_bwd on the CPU: out = relu(x + residual), and the gradient under its mask that
// both inputs share. The memory of tensors in one dense format is one row of elements, whichever format that is.
#include "cpu/tensor_rows.h"

namespace fused_cnn {
namespace {

Tensor add_relu_fwd(const Tensor& x, const Tensor& residual) {
  const char* op = "add_relu_fwd";
  check_4d(op, "x", x);
  check_like(op, "x", x, "residual", residual);
  const MemoryFormat format = result_format(x);
  const Tensor out = empty_like_4d(x, format);
  residual_relu(dtype_of(op, "x", x), dense(x, format), dense(residual, format), true, out);
  return out;
}

// The gradient has out's layout: grad_out may be a slice of a concatenation's gradient, or expanded.
Tensor add_relu_bwd(const Tensor& grad_out, const Tensor& out) {
  const char* op = "add_relu_bwd";
  check_4d(op, "grad_out", grad_out);
  check_like(op, "grad_out", grad_out, "out", out);
  const DType dtype = dtype_of(op, "grad_out", grad_out);
  const MemoryFormat format = result_format(out);
  const Tensor dense_grad = dense(grad_out, format), dense_out = dense(out, format), grad = empty_like_4d(out, format);
  parallel_elements(grad.numel(), [&](int64_t begin, int64_t end) {
    const DreluBgrad row{.grad_out = elements_at(dense_grad, begin),
                         .out = elements_at(dense_out, begin),
                         .grad = elements_at(grad, begin),
                         .channels = end - begin};
    FUSED_CNN_PICK(drelu_bgrad)(dtype, row, 0, 1, nullptr);
  });
  return grad;
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("add_relu_fwd", FUSED_CNN_BOX(&fused_cnn::add_relu_fwd));
  m.impl("add_relu_bwd", FUSED_CNN_BOX(&fused_cnn::add_relu_bwd));
}
