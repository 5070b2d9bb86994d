// fused_cnn::bn_relu_concat_bwd and bn_add_relu_bwd on the CPU, in two passes: the sums per channel, combined
// over tasks in a fixed order, which are the parameters' gradients; then the inputs' gradients.
#include "batch_norm/cpu_inputs.h"

namespace fused_cnn {
namespace {

// Per-channel sums over all rows become the parameters' gradients and grad_input's vectors. A task's partial
// sums are those of g for every channel of `grad_channels`, then those of g * (x - mean) for every channel of
// the inputs.
template <typename C>
void finish_sums(const Inputs& in, const RowTasks& tasks, const C* partial, int64_t grad_channels, C* grad_weight,
                 C* grad_bias, C* offset, C* slope) {
  const C* rstd = static_cast<const C*>(in.rstd.data_ptr());
  const int64_t width = grad_channels + in.total;
  const double n = static_cast<double>(in.rows);
  parallel_channels(in.total, [&](int64_t first, int64_t channels) {
    double sum[kFinishChannels] = {}, sum_x[kFinishChannels] = {};
    for (int64_t task = 0; task < tasks.count; ++task) {
      const C *g = partial + task * width, *gx = g + grad_channels;
      for (int64_t c = 0; c < channels; ++c) {
        sum[c] += g[(first + c) % grad_channels];
        sum_x[c] += gx[first + c];
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      const double r = rstd[first + c];
      grad_bias[first + c] = static_cast<C>(sum[c]);
      grad_weight[first + c] = static_cast<C>(sum_x[c] * r);
      offset[first + c] = static_cast<C>(sum[c] / n);
      slope[first + c] = static_cast<C>(sum_x[c] * r * r / n);
    }
  });
}

struct Gradients {
  Tensor weight, bias;
  std::unique_ptr<char[]> offset, slope;

  explicit Gradients(const Inputs& in)
      : weight(in.empty_like_mean(in.total)),
        bias(in.empty_like_mean(in.total)),
        offset(scratch(in.total * in.vector_size)),
        slope(scratch(in.total * in.vector_size)) {}

  // reduce(first row, rows, task's partial sums) for blocks of every task, then the sums over tasks.
  template <typename Reduce>
  void sum(const Inputs& in, int64_t grad_channels, const Reduce& reduce) {
    const RowTasks tasks(in.rows, in.total);
    const int64_t width = grad_channels + in.total;
    const auto partial = scratch(tasks.count * width * in.vector_size);
    tasks.run([&](int64_t task) {
      char* sums = in.vector_at(partial.get(), task * width);
      memset(sums, 0, width * in.vector_size);
      const int64_t begin = tasks.begin(task);
      row_blocks(begin, begin + tasks.size(task), in.total,
                 [&](int64_t row, int64_t rows) { reduce(row, rows, sums); });
    });
    const auto finish = [&]<typename C>(C) {
      const auto p = [](void* v) { return static_cast<C*>(v); };
      finish_sums<C>(in, tasks, p(partial.get()), grad_channels, p(weight.data_ptr()), p(bias.data_ptr()),
                     p(offset.get()), p(slope.get()));
    };
    in.dtype == DType::f64 ? finish(double{}) : finish(float{});
  }

  BnGrad of(const Inputs& in, size_t branch, const RowResult& grad_x, int64_t row, bool training) const {
    const int64_t first = in.first[branch];
    return {at(grad_x.data, row * in.channels[branch], in.element_size),
            training ? in.vector_at(offset.get(), first) : nullptr,
            training ? in.vector_at(slope.get(), first) : nullptr};
  }
};

std::tuple<std::vector<Tensor>, Tensor, Tensor> bn_relu_concat_bwd(const Tensor& grad_out,
                                                                   const std::vector<Tensor>& xs, const Tensor& mean,
                                                                   const Tensor& rstd,
                                                                   const std::vector<Tensor>& weights,
                                                                   const std::vector<Tensor>& biases,
                                                                   const std::vector<bool>& training, bool relu) {
  const char* op = "bn_relu_concat_bwd";
  const Inputs in(op, xs, mean, rstd, weights, biases);
  check_gradient(op, grad_out, xs[0], in.total, training, xs.size());
  const RowView grad = rows_of(grad_out);
  const auto slice = [&](size_t i, int64_t row) {
    return BnRows{at(grad.data, row * grad.stride + in.first[i], in.element_size), grad.stride, nullptr};
  };
  Gradients gradients(in);
  gradients.sum(in, in.total, [&](int64_t row, int64_t rows, char* sums) {
    for (size_t i = 0; i < xs.size(); ++i) {
      const BnInput branch = in.from_row(i, row);
      const BnSums to{at(sums, in.first[i], in.vector_size),
                      {at(sums, in.total + in.first[i], in.vector_size), nullptr}};
      FUSED_CNN_PICK(bn_reduce)(in.dtype, &branch, 1, slice(i, row), relu, nullptr, to, in.channels[i], rows);
    }
  });
  std::vector<RowResult> grad_xs;
  for (const Tensor& x : xs) grad_xs.emplace_back(x, x.size(1), result_format(x), empty_result);
  parallel_row_blocks(in.rows, in.total, [&](int64_t row, int64_t rows) {
    for (size_t i = 0; i < xs.size(); ++i) {
      const BnInput branch = in.from_row(i, row);
      const BnGrad to = gradients.of(in, i, grad_xs[i], row, training[i]);
      FUSED_CNN_PICK(bn_grad_input)(in.dtype, &branch, 1, slice(i, row), relu, &to, in.channels[i], rows);
    }
  });
  std::vector<Tensor> results;
  for (const RowResult& g : grad_xs) results.push_back(g.finish());
  return {results, gradients.weight, gradients.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_relu_bwd(const Tensor& grad_out, const Tensor& x,
                                                           const std::optional<Tensor>& residual,
                                                           const std::optional<Tensor>& mask, const Tensor& mean,
                                                           const Tensor& rstd, const std::vector<Tensor>& weights,
                                                           const std::vector<Tensor>& biases,
                                                           const std::vector<bool>& training) {
  const char* op = "bn_add_relu_bwd";
  const std::vector<Tensor> xs = normalized_inputs(op, x, residual, weights.size());
  const Inputs in(op, xs, mean, rstd, weights, biases);
  const int64_t channels = x.size(1), bytes = mask_bytes(channels);
  const int count = static_cast<int>(xs.size());
  check_gradient(op, grad_out, x, channels, training, xs.size());
  const bool plain = count == 1;
  Tensor bits_tensor;
  if (plain) bits_tensor = checked_mask(op, mask, x);
  const RowView grad = rows_of(grad_out);
  const RowResult grad_x(x, channels, result_format(x), empty_result),
      grad_residual(x, channels, result_format(x), empty_result);
  const auto gradient_rows = [&](int64_t row) {
    uint8_t* bits = plain ? static_cast<uint8_t*>(bits_tensor.data_ptr()) + row * bytes : nullptr;
    return BnRows{at(grad.data, row * grad.stride, in.element_size), grad.stride, bits};
  };
  Gradients gradients(in);
  gradients.sum(in, channels, [&](int64_t row, int64_t rows, char* sums) {
    const BnInput inputs[] = {in.from_row(0, row), in.from_row(count - 1, row)};
    const BnSums to{sums, {at(sums, channels, in.vector_size), at(sums, count * channels, in.vector_size)}};
    void* masked = plain ? at(grad_residual.data, row * channels, in.element_size) : nullptr;
    FUSED_CNN_PICK(bn_reduce)(in.dtype, inputs, count, gradient_rows(row), true, masked, to, channels, rows);
  });
  parallel_row_blocks(in.rows, in.total, [&](int64_t row, int64_t rows) {
    const BnInput inputs[] = {in.from_row(0, row), in.from_row(count - 1, row)};
    const BnGrad to[] = {gradients.of(in, 0, grad_x, row, training[0]),
                         gradients.of(in, count - 1, grad_residual, row, training[count - 1])};
    // With a plain residual the masked gradient has been written: it is the residual's own.
    const BnRows from =
        plain ? BnRows{at(grad_residual.data, row * channels, in.element_size), channels, nullptr} : gradient_rows(row);
    FUSED_CNN_PICK(bn_grad_input)(in.dtype, inputs, count, from, !plain, to, channels, rows);
  });
  return {grad_x.finish(), grad_residual.finish(), gradients.weight, gradients.bias};
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("bn_relu_concat_bwd", FUSED_CNN_BOX(&fused_cnn::bn_relu_concat_bwd));
  m.impl("bn_add_relu_bwd", FUSED_CNN_BOX(&fused_cnn::bn_add_relu_bwd));
}
