// fused_cnn::bn_stats, bn_relu_concat_fwd and bn_add_relu_fwd on the CPU: check everything, view activations as rows of
// channels, run the loops on every thread, and combine the tasks' moments in a fixed order.
#include <cmath>
#include "batch_norm/cpu_inputs.h"

namespace fused_cnn {
namespace {

// Combines the tasks' moments, in order and in double.
template <typename C>
void finish_stats(const RowTasks& tasks, const C* partial, int64_t total, const double* eps, C* mean, C* rstd, C* var) {
  parallel_channels(total, [&](int64_t first, int64_t channels) {
    double m[kFinishChannels] = {}, m2[kFinishChannels] = {}, n = 0;
    for (int64_t task = 0; task < tasks.count; ++task) {
      const double other = static_cast<double>(tasks.size(task)), share = other / (n + other), product = n * share;
      const C *task_mean = partial + task * 2 * total + first, *task_m2 = task_mean + total;
      for (int64_t c = 0; c < channels; ++c) {
        batch_norm::merge_moments<double>(m[c], m2[c], task_mean[c], task_m2[c], share, product);
      }
      n += other;
    }
    for (int64_t c = 0; c < channels; ++c) {
      mean[first + c] = static_cast<C>(m[c]);
      rstd[first + c] = static_cast<C>(1 / std::sqrt(m2[c] / n + eps[first + c]));
      var[first + c] = static_cast<C>(m2[c] / (n - 1));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> bn_stats(const std::vector<Tensor>& xs, const std::vector<double>& eps) {
  const char* op = "bn_stats";
  const int64_t total = check_statistics(op, xs, eps), rows = row_count(xs[0]);
  const DType dtype = dtype_of(op, "x", xs[0]);
  const ScalarType type = vector_dtype(dtype);
  const Tensor mean = empty_vector(xs[0], total, type), rstd = empty_vector(xs[0], total, type);
  const Tensor var = empty_vector(xs[0], total, type);
  const RowTasks tasks(rows, total);

  std::vector<RowView> views;
  std::vector<double> channel_eps;
  for (size_t i = 0; i < xs.size(); ++i) {
    views.push_back(rows_of(xs[i]));
    channel_eps.insert(channel_eps.end(), xs[i].size(1), eps[i]);
  }
  const int64_t vector_size = mean.element_size();
  const auto partial = scratch(tasks.count * 2 * total * vector_size);  // a task's means, then its squared differences
  tasks.run([&](int64_t task) {
    int64_t first = task * 2 * total;
    for (const RowView& view : views) {
      const int64_t channels = view.tensor.size(1);
      FUSED_CNN_PICK(bn_moments)(dtype, rows_at(view), channels, tasks.begin(task), tasks.begin(task + 1),
                                 at(partial.get(), first, vector_size), at(partial.get(), first + total, vector_size));
      first += channels;
    }
  });
  with_type(dtype, [&](auto element) {
    using C = compute_t<decltype(element)>;
    finish_stats<C>(tasks, reinterpret_cast<const C*>(partial.get()), total, channel_eps.data(),
                    static_cast<C*>(mean.data_ptr()), static_cast<C*>(rstd.data_ptr()),
                    static_cast<C*>(var.data_ptr()));
  });
  return {mean, rstd, var};
}

Tensor bn_relu_concat_fwd(const std::vector<Tensor>& xs, const Tensor& mean, const Tensor& rstd,
                          const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, bool relu) {
  const Inputs in("bn_relu_concat_fwd", xs, mean, rstd, weights, biases);
  const RowResult out(xs[0], in.total, result_format(xs[0]), empty_result);
  std::vector<BnForward> branches;
  for (size_t i = 0; i < xs.size(); ++i) {
    branches.push_back({.inputs = {in.inputs[i]},
                        .count = 1,
                        .out = rows_at(out, in.first[i]),
                        .relu = relu,
                        .channels = in.channels[i]});
  }
  parallel_row_blocks(in.rows, in.total, [&](int64_t begin, int64_t end) {
    for (const BnForward& branch : branches) FUSED_CNN_PICK(bn_apply)(in.dtype, branch, begin, end);
  });
  return out.finish();
}

std::tuple<Tensor, Tensor> bn_add_relu_fwd(const Tensor& x, const Tensor& residual, const Tensor& mean,
                                           const Tensor& rstd, const std::vector<Tensor>& weights,
                                           const std::vector<Tensor>& biases, bool save_mask) {
  const char* op = "bn_add_relu_fwd";
  const std::vector<Tensor> xs = normalized_inputs(op, x, residual, weights.size());
  const Inputs in(op, xs, mean, rstd, weights, biases);
  const bool plain = xs.size() == 1;  // the residual is added as it is
  const RowResult out(x, x.size(1), result_format(x), empty_result);
  const Tensor mask = empty_mask(x, plain && save_mask ? in.rows : 0);
  const RowView addend = rows_of(residual);
  const BnForward args{.inputs = {in.inputs.front(), in.inputs.back()},
                       .count = static_cast<int>(xs.size()),
                       .residual = plain ? rows_at(addend) : Rows{},
                       .out = rows_at(out),
                       .bits = plain && save_mask ? static_cast<uint8_t*>(mask.data_ptr()) : nullptr,
                       .channels = x.size(1)};
  parallel_row_blocks(in.rows, in.total,
                      [&](int64_t begin, int64_t end) { FUSED_CNN_PICK(bn_apply)(in.dtype, args, begin, end); });
  return {out.finish(), mask};
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("bn_stats", FUSED_CNN_BOX(&fused_cnn::bn_stats));
  m.impl("bn_relu_concat_fwd", FUSED_CNN_BOX(&fused_cnn::bn_relu_concat_fwd));
  m.impl("bn_add_relu_fwd", FUSED_CNN_BOX(&fused_cnn::bn_add_relu_fwd));
}
