// fused_cnn::add_relu_fwd and _bwd: out = relu(x + residual), and the gradient under its mask that both inputs share.
// Both read two tensors and write one.
#pragma once
#include "shared/passes.h"

namespace fused_cnn {

inline Tensor add_relu_fwd(const Tensor& x, const Tensor& residual) {
  const char* op = "add_relu_fwd";
  check_4d(op, "x", x);
  check_like(op, "x", x, "residual", residual);
  const MemoryFormat format = result_format(x);
  const Tensor dense_x = dense(x, format), added = dense(residual, format), out = empty_like_4d(x, format);
  for_elements(out.numel(), [&](const auto& of, int64_t width, int64_t rows) {
    bias_residual_relu(out, {{.y = of(dense_x), .residual = of(added), .out = of(out), .channels = width}},
                       /*relu=*/true, rows);
  });
  return out;
}

// The gradient has out's layout: grad_out may be a slice of a concatenation's gradient, or expanded.
inline Tensor add_relu_bwd(const Tensor& grad_out, const Tensor& out) {
  const char* op = "add_relu_bwd";
  check_4d(op, "grad_out", grad_out);
  check_like(op, "grad_out", grad_out, "out", out);
  const MemoryFormat format = result_format(out);
  const Tensor dense_grad = dense(grad_out, format), dense_out = dense(out, format), grad = empty_like_4d(out, format);
  for_elements(grad.numel(), [&](const auto& of, int64_t width, int64_t rows) {
    drelu_bgrad(grad, of(dense_grad), of(dense_out), {{.grad = of(grad).data, .channels = width, .first = 0}}, rows,
                /*wants_sums=*/false, grad.scalar_type());
  });
  return grad;
}

}  // namespace fused_cnn
