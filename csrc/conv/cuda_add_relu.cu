// fused_cnn::add_relu_fwd and _bwd on CUDA: the pass that follows a convolution, without a bias, and ReLU's mask. Both
// read two tensors and write one, whose memory in one dense layout is rows of 64 elements and a rest.
#include "cuda/bias_residual_relu.cuh"
#include "cuda/drelu_bgrad.cuh"

namespace fused_cnn {
namespace {

// body(first element, width, rows) for all of n elements.
template <typename Body>
void flat_rows(int64_t n, const Body& body) {
  constexpr int64_t kWidth = 64;
  const int64_t rest = n % kWidth;
  if (n >= kWidth) body(0, kWidth, n / kWidth);
  if (rest > 0) body(n - rest, rest, 1);
}

Tensor add_relu_fwd(const Tensor& x, const Tensor& residual) {
  const char* op = "add_relu_fwd";
  check_4d(op, "x", x);
  check_like(op, "x", x, "residual", residual);
  const MemoryFormat format = result_format(x);
  const Launch launch(x);
  const Tensor dense_x = dense(x, format), dense_residual = dense(residual, format);
  Tensor out = empty_like_4d(x, format);
  with_type(dtype_of(op, "x", x), [&](auto element) {
    using T = decltype(element);
    flat_rows(x.numel(), [&](int64_t first, int64_t width, int64_t rows) {
      const EpilogueBranch<T, T> branch{.y = static_cast<const T*>(dense_x.data_ptr()) + first,
                                        .y_pitch = width,
                                        .bias = nullptr,
                                        .residual = static_cast<const T*>(dense_residual.data_ptr()) + first,
                                        .residual_pitch = width,
                                        .out = static_cast<T*>(out.data_ptr()) + first,
                                        .out_pitch = width,
                                        .channels = width};
      bias_residual_relu<T, T>(launch, {branch}, true, rows);
    });
  });
  return out;
}

Tensor add_relu_bwd(const Tensor& grad_out, const Tensor& out) {
  const char* op = "add_relu_bwd";
  check_4d(op, "grad_out", grad_out);
  check_like(op, "grad_out", grad_out, "out", out);
  const MemoryFormat format = result_format(out);
  const Launch launch(out);
  const Tensor dense_grad = dense(grad_out, format), dense_out = dense(out, format);
  Tensor grad = empty_like_4d(out, format);
  with_type(dtype_of(op, "grad_out", grad_out), [&](auto element) {
    using T = decltype(element);
    flat_rows(out.numel(), [&](int64_t first, int64_t width, int64_t rows) {
      const auto view = [&](const Tensor& t) {
        return RowView{.tensor = t, .data = static_cast<T*>(t.data_ptr()) + first, .stride = width};
      };
      const RowView from = view(dense_grad), mask = view(dense_out);
      const std::vector<DreluBranch<T>> branch{
          {.grad = static_cast<T*>(grad.data_ptr()) + first, .channels = width, .first = 0}};
      drelu_bgrad<T, T>(launch, from, mask, branch, nullptr, rows);
    });
  });
  return grad;
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("add_relu_fwd", FUSED_CNN_BOX(&fused_cnn::add_relu_fwd));
  m.impl("add_relu_bwd", FUSED_CNN_BOX(&fused_cnn::add_relu_bwd));
}
