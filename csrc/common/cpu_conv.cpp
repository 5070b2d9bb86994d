// The convolution rooms' CPU work: the library's convolution with the epilogue in one pass behind it, and the epilogue's gradient
// (mask and column sums in one pass) before the library's convolution gradients.
#include "common/cpu_conv.h"
#include <algorithm>
#include "common/cpu_kernels.h"
#include "common/cpu_parallel.h"

namespace fused_cnn {
namespace {

Tensor as_float_vector(const Tensor& like, const std::vector<double>& values) {
  const int64_t sizes[] = {static_cast<int64_t>(values.size())};
  Tensor wide = torch::stable::empty(sizes, ScalarType::Double, torch::headeronly::Layout::Strided, like.device());
  double* to = static_cast<double*>(wide.data_ptr());
  for (size_t i = 0; i < values.size(); ++i) to[i] = values[i];
  return torch::stable::to(wide, like.scalar_type());
}

}  // namespace

Tensor cpu_conv_forward(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& residual, const ConvParams& params, bool relu) {
  check_conv(op, x, weight, bias, residual, params);
  const DType dtype = dtype_of(op, "x", x);
  const MemoryFormat format = result_format(x);
  Tensor out = dense(library_conv(x, weight, bias, params), format);
  if (!relu && !residual) return out;
  const Tensor addend = residual ? dense(*residual, format) : out;
  const void* from = residual ? addend.data_ptr() : nullptr;
  void* to = out.data_ptr();
  const int64_t size = out.element_size();
  const auto loop = FUSED_CNN_PICK(epilogue);
  parallel_elements(out.numel(), [&](int64_t begin, int64_t end) {
    loop(dtype, at(to, begin, size), from == nullptr ? nullptr : at(from, begin, size), end - begin, relu);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_conv_backward(const char* op, const Tensor& grad_out,
                                                             const std::optional<Tensor>& out, const Tensor& x,
                                                             const Tensor& weight, const ConvParams& params,
                                                             bool needs_x, bool needs_weight, bool needs_bias) {
  check_conv(op, x, weight, std::nullopt, grad_out, params);
  if (out) check_like(op, "grad_out", grad_out, "out", *out);
  const DType dtype = dtype_of(op, "grad_out", grad_out);
  const int64_t channels = grad_out.size(1), rows = channels == 0 ? 0 : grad_out.numel() / channels;
  // Column sums want channels adjacent; the masked gradient goes on to the library, which takes either layout.
  const Tensor dense_grad = dense(grad_out, MemoryFormat::ChannelsLast);
  Tensor grad = dense_grad;
  std::vector<double> sums(channels, 0.0);
  if ((out || needs_bias) && rows > 0) {
    if (out) grad = empty_like_4d(grad_out, MemoryFormat::ChannelsLast);
    const Tensor dense_out = out ? dense(*out, MemoryFormat::ChannelsLast) : grad;
    const void* po = out ? dense_out.data_ptr() : nullptr;
    const void* pg = dense_grad.data_ptr();
    void* to = out ? grad.data_ptr() : nullptr;
    const auto loop = FUSED_CNN_PICK(mask_and_sum);
    // As many parts as the tensor's size gives, whatever the number of threads, and added in order: the same sums every time.
    const int64_t parts = std::clamp<int64_t>(rows * channels / kGrain, 1, 64);
    std::vector<double> partial(parts * channels, 0.0);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        loop(dtype, pg, po, to, &partial[p * channels], rows * p / parts, rows * (p + 1) / parts, channels);
      }
    });
    for (int64_t p = 0; p < parts; ++p) {
      for (int64_t c = 0; c < channels; ++c) sums[c] += partial[p * channels + c];
    }
  }
  const auto none = [&] {
    const int64_t sizes[] = {0};
    return torch::stable::new_empty(grad_out, sizes);
  };
  Tensor grad_x = none(), grad_weight = none();
  if (needs_x || needs_weight) {
    auto [gx, gw] = library_conv_backward(grad, x, weight, params, needs_x, needs_weight);
    if (needs_x) grad_x = dense(gx, result_format(x));
    if (needs_weight) grad_weight = dense(gw, result_format(weight));
  }
  return {grad_x, grad_weight, needs_bias ? as_float_vector(grad_out, sums) : none(),
          out ? dense(grad, result_format(*out)) : none()};
}

}  // namespace fused_cnn
