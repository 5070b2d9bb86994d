// fused_cnn::add_relu_fwd and _bwd on CUDA: the pass that follows a convolution, without a bias, and ReLU's mask. Both
// read two tensors and write one, whose memory in one dense layout is rows of 64 elements and a rest.
#include "cuda/bias_residual_relu.cuh"
#include "cuda/drelu_bgrad.cuh"

namespace fused_cnn {
namespace {

// run(launch, a, b, out, width, rows) on typed memory, for a tensor like `like` made of a and b, all in its layout.
template <typename Run>
Tensor elementwise(const char* op, const char* name_a, const Tensor& a, const char* name_b, const Tensor& b,
                   const Tensor& like, const Run& run) {
  constexpr int64_t kWidth = 64;
  check_4d(op, name_a, a);
  check_like(op, name_a, a, name_b, b);
  const MemoryFormat format = result_format(like);
  const Launch launch(a);
  const Tensor dense_a = dense(a, format), dense_b = dense(b, format), out = empty_like_4d(like, format);
  with_type(dtype_of(op, name_a, a), [&](auto element) {
    using T = decltype(element);
    const auto run_rows = [&](int64_t first, int64_t width, int64_t rows) {
      run(launch, data_of<T>(dense_a) + first, data_of<T>(dense_b) + first, data_of<T>(out) + first, width, rows);
    };
    const int64_t n = a.numel(), rest = n % kWidth;
    if (n >= kWidth) run_rows(0, kWidth, n / kWidth);
    if (rest > 0) run_rows(n - rest, rest, 1);
  });
  return out;
}

Tensor add_relu_fwd(const Tensor& x, const Tensor& residual) {
  const auto run = [](const Launch& launch, auto* x, auto* residual, auto* out, int64_t width, int64_t rows) {
    using T = std::remove_pointer_t<decltype(x)>;
    const EpilogueBranch<T, T> branch{.y = x,
                                      .y_pitch = width,
                                      .bias = nullptr,
                                      .residual = residual,
                                      .residual_pitch = width,
                                      .out = out,
                                      .out_pitch = width,
                                      .channels = width};
    bias_residual_relu<T, T>(launch, {branch}, true, rows);
  };
  return elementwise("add_relu_fwd", "x", x, "residual", residual, x, run);
}

// The gradient has out's layout: grad_out may be a slice of a concatenation's gradient, or expanded.
Tensor add_relu_bwd(const Tensor& grad_out, const Tensor& out) {
  const auto run = [](const Launch& launch, auto* grad_out, auto* out, auto* grad, int64_t width, int64_t rows) {
    using T = std::remove_pointer_t<decltype(grad)>;
    const RowView from{.tensor = {}, .data = grad_out, .stride = width},
        mask{.tensor = {}, .data = out, .stride = width};
    drelu_bgrad<T, T>(launch, from, mask, {{.grad = grad, .channels = width, .first = 0}}, nullptr, rows);
  };
  return elementwise("add_relu_bwd", "grad_out", grad_out, "out", out, out, run);
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("add_relu_fwd", FUSED_CNN_BOX(&fused_cnn::add_relu_fwd));
  m.impl("add_relu_bwd", FUSED_CNN_BOX(&fused_cnn::add_relu_bwd));
}
