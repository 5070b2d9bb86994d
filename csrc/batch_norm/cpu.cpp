// fused_cnn::bn_stats, bn_relu_concat_fwd/_bwd and bn_add_relu_fwd/_bwd on the CPU: check everything, view activations as rows of
// channels, run the loops on every thread, and combine the tasks' partial sums in a fixed order.
#include <cmath>
#include <optional>
#include <tuple>
#include "batch_norm/cpu_kernels.h"
#include "batch_norm/math.h"
#include "common/cpu_parallel.h"
#include "common/rows.h"

namespace fused_cnn {
namespace {

using torch::headeronly::toString;

// Normalised inputs and their per-channel vectors, checked; branch i's channels begin at first[i].
struct Inputs {
  DType dtype;
  ScalarType vector_type;
  int64_t element_size, vector_size;
  int64_t rows, total;
  std::vector<RowView> views;
  std::vector<Tensor> biases;  // keeps them alive
  Tensor mean, rstd, scale;
  std::vector<BnInput> branches;
  std::vector<int64_t> first, channels;

  Inputs(const char* op, const std::vector<Tensor>& xs, const Tensor& mean_, const Tensor& rstd_,
         const std::vector<Tensor>& weights, const std::vector<Tensor>& biases_)
      : total(check_branches(op, xs)) {
    const Tensor& x = xs[0];
    dtype = dtype_of(op, "x", x);
    vector_type = vector_dtype(dtype);
    element_size = x.element_size();
    rows = row_count(x);
    FUSED_CNN_CHECK(weights.size() == xs.size() && biases_.size() == xs.size(), op, ": expected one weight and one bias for each of ",
                    xs.size(), " inputs, got ", weights.size(), " and ", biases_.size());
    mean = checked_vector(op, "mean", mean_, total, x, vector_type);
    rstd = checked_vector(op, "rstd", rstd_, total, x, vector_type);
    scale = empty_vector(x, total, vector_type);
    vector_size = mean.element_size();
    int64_t begin = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      const int64_t c = xs[i].size(1);
      views.push_back(rows_of(xs[i]));
      const Tensor weight = checked_vector(op, "weight", weights[i], c, x, vector_type);
      biases.push_back(checked_vector(op, "bias", biases_[i], c, x, vector_type));
      multiply(vector_at(rstd, begin), weight.data_ptr(), vector_at(scale, begin), c);
      branches.push_back({views[i].data, views[i].stride, vector_at(mean, begin), vector_at(scale, begin),
                          biases[i].data_ptr()});
      first.push_back(begin);
      channels.push_back(c);
      begin += c;
    }
  }

  void multiply(const void* a, const void* b, void* out, int64_t n) const {
    const auto run = [&]<typename C>(C) {
      for (int64_t c = 0; c < n; ++c) static_cast<C*>(out)[c] = static_cast<const C*>(a)[c] * static_cast<const C*>(b)[c];
    };
    dtype == DType::f64 ? run(double{}) : run(float{});
  }
  void* vector_at(const Tensor& v, int64_t channel) const {
    return at(v.data_ptr(), channel, v.element_size());
  }
  BnInput from_row(size_t branch, int64_t row) const {
    BnInput in = branches[branch];
    in.x = at(in.x, row * in.stride, element_size);
    return in;
  }
  // Rows that stay in the second-level cache while every branch works on them.
  int64_t block_rows() const { return std::max<int64_t>(4, (int64_t{1} << 16) / std::max<int64_t>(1, total)); }
};

template <typename Body>
void in_blocks(int64_t begin, int64_t end, int64_t block, const Body& body) {
  for (int64_t row = begin; row < end; row += block) body(row, std::min(block, end - row));
}

template <typename Body>
void parallel_rows(const Inputs& in, const Body& body) {
  if (in.rows * in.total == 0) return;
  torch::stable::parallel_for(0, in.rows, std::max<int64_t>(1, kGrain / in.total), [&](int64_t begin, int64_t end) {
    in_blocks(begin, end, in.block_rows(), body);
  });
}

constexpr int64_t kFinishChannels = 256;

// body(first channel, how many) for every channel, at most kFinishChannels at a time.
template <typename Body>
void parallel_channels(int64_t channels, const Body& body) {
  torch::stable::parallel_for(0, channels, kFinishChannels,
                              [&](int64_t begin, int64_t end) { in_blocks(begin, end, kFinishChannels, body); });
}

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
  const int64_t total = check_branches(op, xs), rows = row_count(xs[0]);
  FUSED_CNN_CHECK(eps.size() == xs.size(), op, ": expected one eps for each of ", xs.size(), " inputs, got ", eps.size());
  FUSED_CNN_CHECK(rows > 0, op, ": an empty batch has no statistics, got ", shape_of(xs[0]));
  const DType dtype = dtype_of(op, "x", xs[0]);
  const ScalarType type = vector_dtype(dtype);
  Tensor mean = empty_vector(xs[0], total, type), rstd = empty_vector(xs[0], total, type),
         var = empty_vector(xs[0], total, type);
  const RowTasks tasks(rows, total);
  const Tensor partial = empty_vector(xs[0], tasks.count * 2 * total, type);
  std::vector<RowView> views;
  std::vector<double> channel_eps;
  for (size_t i = 0; i < xs.size(); ++i) {
    views.push_back(rows_of(xs[i]));
    channel_eps.insert(channel_eps.end(), xs[i].size(1), eps[i]);
  }
  const int64_t size = xs[0].element_size(), vector_size = mean.element_size();
  tasks.run([&](int64_t task) {
    int64_t first = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      const int64_t channels = xs[i].size(1);
      FUSED_CNN_PICK(bn_moments)(dtype, at(views[i].data, tasks.begin(task) * views[i].stride, size), views[i].stride,
                                 channels, tasks.size(task), at(partial.data_ptr(), task * 2 * total + first, vector_size),
                                 at(partial.data_ptr(), (task * 2 + 1) * total + first, vector_size));
      first += channels;
    }
  });
  const auto finish = [&]<typename C>(C) {
    finish_stats<C>(tasks, static_cast<const C*>(partial.data_ptr()), total, channel_eps.data(),
                    static_cast<C*>(mean.data_ptr()), static_cast<C*>(rstd.data_ptr()), static_cast<C*>(var.data_ptr()));
  };
  dtype == DType::f64 ? finish(double{}) : finish(float{});
  return {mean, rstd, var};
}

Tensor bn_relu_concat_fwd(const std::vector<Tensor>& xs, const Tensor& mean, const Tensor& rstd,
                          const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, bool relu) {
  const Inputs in("bn_relu_concat_fwd", xs, mean, rstd, weights, biases);
  const RowResult out(xs[0], in.total, result_format(xs[0]));
  parallel_rows(in, [&](int64_t row, int64_t rows) {
    for (size_t i = 0; i < xs.size(); ++i) {
      const BnInput branch = in.from_row(i, row);
      const BnRows slice{at(out.data, row * in.total + in.first[i], in.element_size), in.total, nullptr};
      FUSED_CNN_PICK(bn_apply)(in.dtype, &branch, 1, nullptr, 0, relu, slice, in.channels[i], rows);
    }
  });
  return out.finish();
}

// Per-channel sums over all rows become the parameters' gradients and grad_input's vectors. A task's partial sums are those of g
// for every channel of `grad_channels`, then those of g * (x - mean) for every channel of the inputs.
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
  Tensor weight, bias, offset, slope;

  explicit Gradients(const Inputs& in) {
    for (Tensor* v : {&weight, &bias, &offset, &slope}) *v = empty_vector(in.mean, in.total, in.vector_type);
  }

  // reduce(first row, rows, task's partial sums) for blocks of every task, then the sums over tasks.
  template <typename Reduce>
  void sum(const Inputs& in, int64_t grad_channels, const Reduce& reduce) {
    const RowTasks tasks(in.rows, in.total);
    const int64_t width = grad_channels + in.total;
    const Tensor partial = empty_vector(in.mean, tasks.count * width, in.vector_type);
    tasks.run([&](int64_t task) {
      char* sums = at(partial.data_ptr(), task * width, in.vector_size);
      memset(sums, 0, width * in.vector_size);
      const int64_t begin = tasks.begin(task);
      in_blocks(begin, begin + tasks.size(task), in.block_rows(),
                [&](int64_t row, int64_t rows) { reduce(row, rows, sums); });
    });
    const auto finish = [&]<typename C>(C) {
      const auto p = [](const Tensor& t) { return static_cast<C*>(t.data_ptr()); };
      finish_sums<C>(in, tasks, p(partial), grad_channels, p(weight), p(bias), p(offset), p(slope));
    };
    in.dtype == DType::f64 ? finish(double{}) : finish(float{});
  }

  BnGrad of(const Inputs& in, size_t branch, const RowResult& grad_x, int64_t row, bool training) const {
    const int64_t first = in.first[branch];
    return {at(grad_x.data, row * in.channels[branch], in.element_size),
            training ? in.vector_at(offset, first) : nullptr, training ? in.vector_at(slope, first) : nullptr};
  }
};

void check_training(const char* op, const std::vector<bool>& training, size_t inputs) {
  FUSED_CNN_CHECK(training.size() == inputs, op, ": expected one training flag for each of ", inputs, " inputs, got ",
                  training.size());
}

void check_gradient(const char* op, const Tensor& grad_out, const Tensor& x, int64_t channels) {
  check_4d(op, "grad_out", grad_out);
  check_like(op, "x", x, "grad_out", grad_out, /*same_shape=*/false);
  FUSED_CNN_CHECK(grad_out.size(0) == x.size(0) && grad_out.size(1) == channels && grad_out.size(2) == x.size(2) &&
                      grad_out.size(3) == x.size(3),
                  op, ": grad_out must have shape (", x.size(0), ", ", channels, ", ", x.size(2), ", ", x.size(3), "), got ",
                  shape_of(grad_out));
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> bn_relu_concat_bwd(const Tensor& grad_out, const std::vector<Tensor>& xs,
                                                                   const Tensor& mean, const Tensor& rstd,
                                                                   const std::vector<Tensor>& weights,
                                                                   const std::vector<Tensor>& biases,
                                                                   const std::vector<bool>& training, bool relu) {
  const char* op = "bn_relu_concat_bwd";
  const Inputs in(op, xs, mean, rstd, weights, biases);
  check_training(op, training, xs.size());
  check_gradient(op, grad_out, xs[0], in.total);
  const RowView grad = rows_of(grad_out);
  const auto slice = [&](size_t i, int64_t row) {
    return BnRows{at(grad.data, row * grad.stride + in.first[i], in.element_size), grad.stride, nullptr};
  };
  Gradients gradients(in);
  gradients.sum(in, in.total, [&](int64_t row, int64_t rows, char* sums) {
    for (size_t i = 0; i < xs.size(); ++i) {
      const BnInput branch = in.from_row(i, row);
      const BnSums to{at(sums, in.first[i], in.vector_size), {at(sums, in.total + in.first[i], in.vector_size), nullptr}};
      FUSED_CNN_PICK(bn_reduce)(in.dtype, &branch, 1, slice(i, row), relu, nullptr, to, in.channels[i], rows);
    }
  });
  std::vector<RowResult> grad_xs;
  for (const Tensor& x : xs) grad_xs.emplace_back(x, x.size(1), result_format(x));
  parallel_rows(in, [&](int64_t row, int64_t rows) {
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

std::vector<Tensor> normalized_inputs(const char* op, const Tensor& x, const std::optional<Tensor>& residual, size_t count) {
  FUSED_CNN_CHECK(count == 1 || count == 2, op, ": expected one weight (for x) or two (for x and residual), got ", count);
  FUSED_CNN_CHECK(count == 1 || residual.has_value(), op, ": a normalised residual is needed, got none");
  return count == 1 ? std::vector<Tensor>{x} : std::vector<Tensor>{x, *residual};
}

std::tuple<Tensor, Tensor> bn_add_relu_fwd(const Tensor& x, const Tensor& residual, const Tensor& mean, const Tensor& rstd,
                                           const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                                           bool save_mask) {
  const char* op = "bn_add_relu_fwd";
  check_4d(op, "x", x);
  check_like(op, "x", x, "residual", residual);
  const std::vector<Tensor> xs = normalized_inputs(op, x, residual, weights.size());
  const Inputs in(op, xs, mean, rstd, weights, biases);
  const int64_t channels = x.size(1), count = xs.size(), bytes = (channels + 7) / 8;
  const bool plain = count == 1;  // the residual is added as it is
  const RowResult out(x, channels, result_format(x));
  const RowView addend = rows_of(residual);
  const int64_t mask_sizes[] = {plain && save_mask ? in.rows : 0, bytes};
  Tensor mask = torch::stable::empty(mask_sizes, ScalarType::Byte, torch::headeronly::Layout::Strided, x.device());
  parallel_rows(in, [&](int64_t row, int64_t rows) {
    const BnInput inputs[] = {in.from_row(0, row), in.from_row(count - 1, row)};
    uint8_t* bits = plain && save_mask ? static_cast<uint8_t*>(mask.data_ptr()) + row * bytes : nullptr;
    const BnRows to{at(out.data, row * channels, in.element_size), channels, bits};
    FUSED_CNN_PICK(bn_apply)(in.dtype, inputs, static_cast<int>(count),
                             plain ? at(addend.data, row * addend.stride, in.element_size) : nullptr, addend.stride, true,
                             to, channels, rows);
  });
  return {out.finish(), mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_relu_bwd(const Tensor& grad_out, const Tensor& x,
                                                           const std::optional<Tensor>& residual,
                                                           const std::optional<Tensor>& mask, const Tensor& mean,
                                                           const Tensor& rstd, const std::vector<Tensor>& weights,
                                                           const std::vector<Tensor>& biases,
                                                           const std::vector<bool>& training) {
  const char* op = "bn_add_relu_bwd";
  check_4d(op, "x", x);
  const std::vector<Tensor> xs = normalized_inputs(op, x, residual, weights.size());
  if (residual) check_like(op, "x", x, "residual", *residual);
  const Inputs in(op, xs, mean, rstd, weights, biases);
  check_training(op, training, xs.size());
  const int64_t channels = x.size(1), bytes = (channels + 7) / 8;
  const int count = static_cast<int>(xs.size());
  check_gradient(op, grad_out, x, channels);
  const bool plain = count == 1;
  Tensor bits_tensor;
  if (plain) {
    FUSED_CNN_CHECK(mask.has_value(), op, ": the forward's mask is needed, got none");
    FUSED_CNN_CHECK(mask->scalar_type() == ScalarType::Byte && mask->dim() == 2 && mask->size(0) == in.rows &&
                        mask->size(1) == bytes && mask->is_cuda() == x.is_cuda(),
                    op, ": mask must be uint8 of shape (", in.rows, ", ", bytes, ") on the device of x, got ",
                    toString(mask->scalar_type()), " ", shape_of(*mask));
    bits_tensor = torch::stable::contiguous(*mask);
  }
  const RowView grad = rows_of(grad_out);
  const RowResult grad_x(x, channels, result_format(x)), grad_residual(x, channels, result_format(x));
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
  parallel_rows(in, [&](int64_t row, int64_t rows) {
    const BnInput inputs[] = {in.from_row(0, row), in.from_row(count - 1, row)};
    const BnGrad to[] = {gradients.of(in, 0, grad_x, row, training[0]),
                         gradients.of(in, count - 1, grad_residual, row, training[count - 1])};
    // With a plain residual the masked gradient has been written: it is the residual's own.
    const BnRows from = plain ? BnRows{at(grad_residual.data, row * channels, in.element_size), channels, nullptr}
                              : gradient_rows(row);
    FUSED_CNN_PICK(bn_grad_input)(in.dtype, inputs, count, from, !plain, to, channels, rows);
  });
  return {grad_x.finish(), grad_residual.finish(), gradients.weight, gradients.bias};
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("bn_stats", TORCH_BOX(&fused_cnn::bn_stats));
  m.impl("bn_relu_concat_fwd", TORCH_BOX(&fused_cnn::bn_relu_concat_fwd));
  m.impl("bn_relu_concat_bwd", TORCH_BOX(&fused_cnn::bn_relu_concat_bwd));
  m.impl("bn_add_relu_fwd", TORCH_BOX(&fused_cnn::bn_add_relu_fwd));
  m.impl("bn_add_relu_bwd", TORCH_BOX(&fused_cnn::bn_add_relu_bwd));
}
