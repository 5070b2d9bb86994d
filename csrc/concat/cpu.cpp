// fused_cnn::concat_bias_relu_fwd and _bwd on the CPU: check, view every tensor as rows of channels, and work
// on a few rows of all branches at a time, so that what branches share of a cache line of the output is
// written while it is in the cache.
#include <optional>
#include <tuple>
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "shared/rows.h"
#include "concat/cpu_kernels.h"

namespace fused_cnn {
namespace {

Tensor concat_bias_relu_fwd(const std::vector<Tensor>& branches, const std::optional<Tensor>& bias, bool relu) {
  const char* op = "concat_bias_relu_fwd";
  const int64_t total = check_branches(op, branches), rows = row_count(branches[0]);
  const DType dtype = dtype_of(op, "branch 0", branches[0]);
  const int64_t size = branches[0].element_size();
  Tensor vector;
  const char* bias_data = nullptr;
  if (bias) {
    vector = checked_vector(op, "bias", *bias, total, branches[0], vector_dtype(dtype));
    bias_data = static_cast<const char*>(vector.data_ptr());
  }
  std::vector<RowView> views;
  for (const Tensor& branch : branches) views.push_back(rows_of(branch));
  const RowResult out(branches[0], total, result_format(branches[0]), empty_result);
  parallel_row_blocks(rows, total, [&](int64_t row, int64_t n) {
    int64_t first = 0;
    for (size_t i = 0; i < branches.size(); ++i) {
      const int64_t channels = branches[i].size(1);
      FUSED_CNN_PICK(concat_fwd)(dtype, at(views[i].data, row * views[i].stride, size), views[i].stride,
                                 bias ? bias_data + first * vector.element_size() : nullptr, relu,
                                 at(out.data, row * total + first, size), total, channels, n);
      first += channels;
    }
  });
  return out.finish();
}

std::tuple<std::vector<Tensor>, Tensor> concat_bias_relu_bwd(const Tensor& grad_out, const std::optional<Tensor>& out,
                                                             const std::vector<int64_t>& channels, bool bias) {
  const char* op = "concat_bias_relu_bwd";
  const int64_t total = check_concatenation(op, grad_out, out, channels);
  const DType dtype = dtype_of(op, "grad_out", grad_out);
  const int64_t size = grad_out.element_size(), rows = row_count(grad_out);
  const RowView grad = rows_of(grad_out);
  RowView outs = grad;
  if (out) outs = rows_of(*out);
  std::vector<RowResult> results;
  for (const int64_t c : channels)
    results.emplace_back(grad_out, c, result_format(out ? *out : grad_out), empty_result);
  const ScalarType type = vector_dtype(dtype);
  Tensor grad_bias = empty_vector(grad_out, bias ? total : 0, type);
  const int64_t vector_size = grad_bias.element_size();
  const RowTasks tasks(rows, total);
  const auto partial = scratch(bias ? tasks.count * total * vector_size : 0);
  tasks.run([&](int64_t task) {
    char* sums = bias ? at(partial.get(), task * total, vector_size) : nullptr;
    if (bias) memset(sums, 0, total * vector_size);
    const int64_t begin = tasks.begin(task);
    row_blocks(begin, begin + tasks.size(task), total, [&](int64_t row, int64_t n) {
      int64_t first = 0;
      for (size_t i = 0; i < channels.size(); ++i) {
        FUSED_CNN_PICK(concat_bwd)(dtype, at(grad.data, row * grad.stride + first, size), grad.stride,
                                   out ? at(outs.data, row * outs.stride + first, size) : nullptr, outs.stride,
                                   at(results[i].data, row * channels[i], size),
                                   bias ? sums + first * vector_size : nullptr, channels[i], n);
        first += channels[i];
      }
    });
  });
  const auto finish = [&]<typename C>(C) {
    C* to = static_cast<C*>(grad_bias.data_ptr());
    const C* from = reinterpret_cast<const C*>(partial.get());
    for (int64_t c = 0; c < total; ++c) {
      double sum = 0;
      for (int64_t task = 0; task < tasks.count; ++task) sum += from[task * total + c];
      to[c] = static_cast<C>(sum);
    }
  };
  if (bias) dtype == DType::f64 ? finish(double{}) : finish(float{});
  std::vector<Tensor> grads;
  for (const RowResult& result : results) grads.push_back(result.finish());
  return {grads, grad_bias};
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("concat_bias_relu_fwd", FUSED_CNN_BOX(&fused_cnn::concat_bias_relu_fwd));
  m.impl("concat_bias_relu_bwd", FUSED_CNN_BOX(&fused_cnn::concat_bias_relu_bwd));
}
