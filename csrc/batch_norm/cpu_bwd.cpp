// fused_cnn::bn_relu_concat_bwd and bn_add_relu_bwd on the CPU, in two passes: the sums per channel, combined over
// tasks in a fixed order, which are the parameters' gradients; then the inputs' gradients.
#include "batch_norm/cpu_inputs.h"

namespace fused_cnn {
namespace {

// Per-channel sums over all rows become the parameters' gradients and grad_input's vectors. A task's partial sums are
// those of g for every channel of `grad_channels`, then those of g * (x - mean) for every channel of the inputs.
template <typename C>
void finish_sums(const Inputs& in, int64_t tasks, const C* partial, int64_t grad_channels, C* grad_weight, C* grad_bias,
                 C* offset, C* slope) {
  const C* rstd = static_cast<const C*>(in.rstd.data_ptr());
  const int64_t width = grad_channels + in.total;
  const double n = static_cast<double>(in.rows);
  parallel_channels(in.total, [&](int64_t first, int64_t channels) {
    double sum[kFinishChannels] = {}, sum_x[kFinishChannels] = {};
    for (int64_t task = 0; task < tasks; ++task) {
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
  const Inputs& in;
  const std::vector<bool>& training;
  Tensor weight, bias;
  std::unique_ptr<char[]> offset, slope;

  Gradients(const Inputs& in, const std::vector<bool>& training)
      : in(in),
        training(training),
        weight(in.empty_like_mean(in.total)),
        bias(in.empty_like_mean(in.total)),
        offset(scratch(in.total * in.vector_size)),
        slope(scratch(in.total * in.vector_size)) {}

  BnGrad of(size_t input, const RowResult& grad_x) const {
    const bool batch = training[input];
    return {.grad_x = rows_at(grad_x),
            .offset = batch ? in.vector_at(offset.get(), in.first[input]) : nullptr,
            .slope = batch ? in.vector_at(slope.get(), in.first[input]) : nullptr};
  }

  // Both passes, over branches whose grad_out has `grad_channels` channels in all.
  void run(const std::vector<BnBackward>& branches, int64_t grad_channels) {
    const RowTasks tasks(in.rows, in.total);
    const auto partial =
        tasks.partial_sums((grad_channels + in.total) * in.vector_size, [&](int64_t begin, int64_t end, char* sums) {
          for (const BnBackward& branch : branches) FUSED_CNN_PICK(bn_reduce)(in.dtype, branch, begin, end, sums);
        });
    with_type(in.dtype, [&](auto element) {
      using C = compute_t<decltype(element)>;
      finish_sums<C>(in, tasks.count, reinterpret_cast<const C*>(partial.get()), grad_channels,
                     static_cast<C*>(weight.data_ptr()), static_cast<C*>(bias.data_ptr()),
                     reinterpret_cast<C*>(offset.get()), reinterpret_cast<C*>(slope.get()));
    });
    parallel_row_blocks(in.rows, in.total, [&](int64_t begin, int64_t end) {
      for (const BnBackward& branch : branches) FUSED_CNN_PICK(bn_grad_input)(in.dtype, branch, begin, end);
    });
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
  Gradients gradients(in, training);
  std::vector<RowResult> grad_xs;
  std::vector<BnBackward> branches;
  for (size_t i = 0; i < xs.size(); ++i) {
    const int64_t first = in.first[i];
    grad_xs.emplace_back(xs[i], xs[i].size(1), result_format(xs[i]), empty_result);
    branches.push_back({.inputs = {in.inputs[i]},
                        .count = 1,
                        .grad_out = rows_at(grad, first),
                        .relu = relu,
                        .channels = in.channels[i],
                        .sum = first,
                        .sum_x = {in.total + first},
                        .grads = {gradients.of(i, grad_xs[i])}});
  }
  gradients.run(branches, in.total);
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
  const int64_t channels = x.size(1);
  check_gradient(op, grad_out, x, channels, training, xs.size());
  const bool plain = xs.size() == 1;
  Tensor bits;
  if (plain) bits = checked_mask(op, mask, x);
  const RowView grad = rows_of(grad_out);
  const RowResult grad_x(x, channels, result_format(x), empty_result);
  const RowResult grad_residual(x, channels, result_format(x), empty_result);
  Gradients gradients(in, training);
  // The masked gradient is that of a plain residual.
  const BnBackward args{
      .inputs = {in.inputs.front(), in.inputs.back()},
      .count = static_cast<int>(xs.size()),
      .grad_out = rows_at(grad),
      .bits = plain ? static_cast<const uint8_t*>(bits.data_ptr()) : nullptr,
      .masked = plain ? rows_at(grad_residual) : Rows{},
      .channels = channels,
      .sum = 0,
      .sum_x = {channels, 2 * channels},
      .grads = {gradients.of(0, grad_x), gradients.of(xs.size() - 1, grad_residual)},
  };
  gradients.run({args}, channels);
  return {grad_x.finish(), grad_residual.finish(), gradients.weight, gradients.bias};
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("bn_relu_concat_bwd", FUSED_CNN_BOX(&fused_cnn::bn_relu_concat_bwd));
  m.impl("bn_add_relu_bwd", FUSED_CNN_BOX(&fused_cnn::bn_add_relu_bwd));
}
