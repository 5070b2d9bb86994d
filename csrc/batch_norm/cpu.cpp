// batch_norm on the CPU: the loops of cpu_kernels.h on every thread, and the tasks' partial sums combined in order, in
// double.
#include <cmath>
#include "batch_norm/cpu_kernels.h"
#include "batch_norm/ops.h"
#include "cpu/parallel.h"

namespace fused_cnn {
namespace {

constexpr int64_t kFinishChannels = 256;

// body(first channel, how many) for every channel, at most kFinishChannels at a time.
template <typename Body>
void parallel_channels(int64_t channels, const Body& body) {
  torch::stable::parallel_for(0, channels, kFinishChannels, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kFinishChannels) body(c, std::min(kFinishChannels, end - c));
  });
}

// Gives the branches' inputs their scale; returns its memory.
std::unique_ptr<char[]> set_scales(const NormalizedInputs& in, std::vector<BnBranch>& branches) {
  auto scales = std::make_unique_for_overwrite<char[]>(in.total * in.mean.element_size());
  with_type(in.dtype, [&](auto element) {
    using C = compute_t<decltype(element)>;
    C* next = reinterpret_cast<C*>(scales.get());
    for (BnBranch& branch : branches) {
      for (BnInput& input : branch.in) {
        if (!input.weight) continue;  // no input, or a plain residual
        const C *rstd = static_cast<const C*>(input.rstd), *weight = static_cast<const C*>(input.weight);
        input.scale = next;
        next = std::transform(rstd, rstd + branch.channels, weight, next, std::multiplies<C>());
      }
    }
  });
  return scales;
}

}  // namespace

void bn_statistics(DType dtype, const std::vector<BnBranch>& branches, int64_t rows, const Tensor& mean,
                   const Tensor& rstd, const Tensor& var) {
  const int64_t total = mean.size(0), size = mean.element_size();
  const RowTasks tasks(rows, total);
  std::vector<double> eps;
  for (const BnBranch& branch : branches) eps.insert(eps.end(), branch.channels, branch.eps);
  // A task's means, then its squared differences.
  const auto partial = std::make_unique_for_overwrite<char[]>(tasks.count * 2 * total * size);
  tasks.run([&](int64_t task) {
    char *means = partial.get() + task * 2 * total * size, *m2 = means + total * size;
    for (const BnBranch& branch : branches) {
      FUSED_CNN_PICK(bn_moments)(dtype, branch.in[0].x, branch.channels, tasks.begin(task), tasks.begin(task + 1),
                                 at(means, branch.first, size), at(m2, branch.first, size));
    }
  });
  with_type(dtype, [&](auto element) {
    using C = compute_t<decltype(element)>;
    C *const mean_at = data_of<C>(mean), *const rstd_at = data_of<C>(rstd), *const var_at = data_of<C>(var);
    parallel_channels(total, [&](int64_t first, int64_t channels) {
      double m[kFinishChannels] = {}, m2[kFinishChannels] = {}, n = 0;
      for (int64_t task = 0; task < tasks.count; ++task) {
        const double other = static_cast<double>(tasks.size(task)), share = other / (n + other), product = n * share;
        const C* task_mean = reinterpret_cast<const C*>(partial.get()) + task * 2 * total + first;
        for (int64_t c = 0; c < channels; ++c) {
          batch_norm::merge_moments<double>(m[c], m2[c], task_mean[c], task_mean[total + c], share, product);
        }
        n += other;
      }
      for (int64_t c = 0; c < channels; ++c) {
        mean_at[first + c] = static_cast<C>(m[c]);
        rstd_at[first + c] = static_cast<C>(1 / std::sqrt(m2[c] / n + eps[first + c]));
        var_at[first + c] = static_cast<C>(m2[c] / (n - 1));
      }
    });
  });
}

void bn_forward(const NormalizedInputs& in, std::vector<BnBranch> branches, Residual residual, bool relu,
                uint8_t* mask) {
  const auto scales = set_scales(in, branches);
  parallel_row_blocks(in.rows, in.total, [&](int64_t begin, int64_t end) {
    for (const BnBranch& b : branches) FUSED_CNN_PICK(bn_apply)(in.dtype, b, residual, relu, mask, begin, end);
  });
}

std::tuple<Tensor, Tensor> bn_backward(const NormalizedInputs& in, std::vector<BnBranch> branches, Residual residual,
                                       bool relu, const uint8_t* mask) {
  const auto scales = set_scales(in, branches);
  const Tensor grad_weight = in.empty_like_mean(in.total), grad_bias = in.empty_like_mean(in.total);
  const int64_t size = in.mean.element_size(), total = residual == Residual::normalized ? in.total / 2 : in.total;
  const auto offset = std::make_unique_for_overwrite<char[]>(in.total * size);
  const auto slope = std::make_unique_for_overwrite<char[]>(in.total * size);
  const RowTasks tasks(in.rows, in.total);
  // A task's sums: those of g, then those of g * (x - mean) of each input.
  const auto partial = tasks.partial_sums((total + in.total) * size, [&](int64_t begin, int64_t end, char* sums) {
    for (const BnBranch& branch : branches) {
      FUSED_CNN_PICK(bn_reduce)(in.dtype, branch, residual, relu, mask, total, begin, end, sums);
    }
  });
  with_type(in.dtype, [&](auto element) {
    using C = compute_t<decltype(element)>;
    const C* const rstd = data_of<C>(in.rstd);
    C *const of_weight = data_of<C>(grad_weight), *const of_bias = data_of<C>(grad_bias);
    C *const offset_at = reinterpret_cast<C*>(offset.get()), *const slope_at = reinterpret_cast<C*>(slope.get());
    parallel_channels(in.total, [&](int64_t first, int64_t channels) {
      double sum[kFinishChannels] = {}, sum_x[kFinishChannels] = {};
      for (int64_t task = 0; task < tasks.count; ++task) {
        const C *g = reinterpret_cast<const C*>(partial.get()) + task * (total + in.total), *gx = g + total;
        for (int64_t c = 0; c < channels; ++c) {
          sum[c] += g[(first + c) % total];
          sum_x[c] += gx[first + c];
        }
      }
      const double n = static_cast<double>(in.rows);
      for (int64_t c = 0; c < channels; ++c) {
        const double r = rstd[first + c];
        of_bias[first + c] = static_cast<C>(sum[c]);
        of_weight[first + c] = static_cast<C>(sum_x[c] * r);
        offset_at[first + c] = static_cast<C>(sum[c] / n);
        slope_at[first + c] = static_cast<C>(sum_x[c] * r * r / n);
      }
    });
  });
  if (residual == Residual::plain) {  // its gradient is there now, and is x's under ReLU's mask
    branches[0].y = {branches[0].grad[1], total};
    residual = Residual::none;
    relu = false;
  }
  parallel_row_blocks(in.rows, in.total, [&](int64_t begin, int64_t end) {
    for (const BnBranch& branch : branches) {
      FUSED_CNN_PICK(bn_grad_input)
      (in.dtype, branch, residual, relu, offset.get(), slope.get(), total, begin, end);
    }
  });
  return {grad_weight, grad_bias};
}

}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("bn_stats", FUSED_CNN_BOX(&fused_cnn::bn_stats));
  m.impl("bn_relu_concat_fwd", FUSED_CNN_BOX(&fused_cnn::bn_relu_concat_fwd));
  m.impl("bn_relu_concat_bwd", FUSED_CNN_BOX(&fused_cnn::bn_relu_concat_bwd));
  m.impl("bn_add_relu_fwd", FUSED_CNN_BOX(&fused_cnn::bn_add_relu_fwd));
  m.impl("bn_add_relu_bwd", FUSED_CNN_BOX(&fused_cnn::bn_add_relu_bwd));
}
