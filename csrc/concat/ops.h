// fused_cnn::concat_bias_relu_fwd and _bwd: all branches in one pass (shared/passes.h), each element read once and
// written once. On the CPU a few rows of all branches at a time, so that what branches share of a cache line of the
// output is written while it is in the cache.
#pragma once
#include <tuple>
#include "shared/passes.h"

namespace fused_cnn {

inline Tensor concat_bias_relu_fwd(const std::vector<Tensor>& xs, const std::optional<Tensor>& bias, bool relu) {
  const char* op = "concat_bias_relu_fwd";
  const int64_t total = check_branches(op, xs);
  const ScalarType vector_type = vector_dtype(dtype_of(op, "branch 0", xs[0]));
  const Tensor vector = bias ? checked_vector(op, "bias", *bias, total, xs[0], vector_type) : Tensor();
  const RowResult out(xs[0], total, result_format(xs[0]));
  std::vector<RowView> views;  // keep the memory
  std::vector<BiasResidualRelu> branches;
  int64_t first = 0;
  for (const Tensor& x : xs) {
    views.push_back(rows_of(x));
    branches.push_back({.y = views.back(),
                        .bias = bias ? at(vector.data_ptr(), first, vector.element_size()) : nullptr,
                        .out = out.from(first),
                        .channels = x.size(1)});
    first += x.size(1);
  }
  bias_residual_relu(xs[0], branches, relu, row_count(xs[0]));
  return out.finish();
}

inline std::tuple<std::vector<Tensor>, Tensor> concat_bias_relu_bwd(const Tensor& grad_out,
                                                                    const std::optional<Tensor>& out,
                                                                    const std::vector<int64_t>& channels, bool bias) {
  const char* op = "concat_bias_relu_bwd";
  check_4d(op, "grad_out", grad_out);
  if (out) check_like(op, "grad_out", grad_out, "out", *out);
  const ScalarType vector_type = vector_dtype(dtype_of(op, "grad_out", grad_out));
  int64_t left = grad_out.size(1);
  for (const int64_t c : channels) {
    FUSED_CNN_CHECK(c >= 0, op, ": channels must not be negative, got ", c);
    FUSED_CNN_CHECK(c <= left, op, ": channels must add up to grad_out's ", grad_out.size(1), ", got ", c, " where ",
                    left, " are left");
    left -= c;
  }
  FUSED_CNN_CHECK(left == 0, op, ": channels must add up to grad_out's ", grad_out.size(1), ", got ",
                  grad_out.size(1) - left);
  std::vector<RowResult> grads;
  std::vector<DreluBranch> branches;
  int64_t first = 0;
  for (const int64_t c : channels) {
    grads.emplace_back(grad_out, c, result_format(out ? *out : grad_out));
    branches.push_back({.grad = grads.back().data, .channels = c, .first = first});
    first += c;
  }
  const Tensor grad_bias = drelu_bgrad(grad_out, rows_of(grad_out), rows_of(out), branches, row_count(grad_out),
                                       /*wants_sums=*/bias, vector_type);
  return {finished(grads), grad_bias};
}

}  // namespace fused_cnn
