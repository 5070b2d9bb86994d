// fused_cnn::concat_bias_relu_fwd and _bwd on the CPU: a few rows of all branches at a time, so that what branches
// share of a cache line of the output is written while it is in the cache.
#include <tuple>
#include "cpu/memory.h"
#include "cpu/tensor_rows.h"

namespace fused_cnn {
namespace {

Tensor concat_bias_relu_fwd(const std::vector<Tensor>& xs, const std::optional<Tensor>& bias, bool relu) {
  const char* op = "concat_bias_relu_fwd";
  const int64_t total = check_branches(op, xs);
  const DType dtype = dtype_of(op, "branch 0", xs[0]);
  Tensor vector;
  if (bias) vector = checked_vector(op, "bias", *bias, total, xs[0], vector_dtype(dtype));
  const RowResult out(xs[0], total, result_format(xs[0]), empty_result);
  std::vector<RowView> views;  // keep the memory
  std::vector<BiasResidualRelu> branches;
  int64_t first = 0;
  for (const Tensor& x : xs) {
    views.push_back(rows_of(x));
    branches.push_back({.y = rows_at(views.back()),
                        .bias = bias ? at(vector.data_ptr(), first, vector.element_size()) : nullptr,
                        .out = rows_at(out, first),
                        .relu = relu,
                        .channels = x.size(1)});
    first += x.size(1);
  }
  parallel_row_blocks(row_count(xs[0]), total, [&](int64_t begin, int64_t end) {
    for (const BiasResidualRelu& branch : branches) FUSED_CNN_PICK(bias_residual_relu)(dtype, branch, begin, end);
  });
  return out.finish();
}

std::tuple<std::vector<Tensor>, Tensor> concat_bias_relu_bwd(const Tensor& grad_out, const std::optional<Tensor>& out,
                                                             const std::vector<int64_t>& channels, bool bias) {
  const char* op = "concat_bias_relu_bwd";
  check_concatenation(op, grad_out, out, channels);
  const DType dtype = dtype_of(op, "grad_out", grad_out);
  const RowView grad = rows_of(grad_out);
  std::optional<RowView> result;
  if (out) result = rows_of(*out);
  std::vector<RowResult> grads;
  std::vector<DreluBgrad> branches;
  int64_t first = 0;
  for (const int64_t c : channels) {
    grads.emplace_back(grad_out, c, result_format(out ? *out : grad_out), empty_result);
    branches.push_back({.grad_out = rows_at(grad, first),
                        .out = result ? rows_at(*result, first) : Rows{},
                        .grad = rows_at(grads.back()),
                        .channels = c});
    first += c;
  }
  const std::vector<double> sums = masked_gradient(dtype, branches, row_count(grad_out), bias);
  std::vector<Tensor> results;
  for (const RowResult& g : grads) results.push_back(g.finish());
  return {results, vector_of(sums, grad_out, vector_dtype(dtype))};
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("concat_bias_relu_fwd", FUSED_CNN_BOX(&fused_cnn::concat_bias_relu_fwd));
  m.impl("concat_bias_relu_bwd", FUSED_CNN_BOX(&fused_cnn::concat_bias_relu_bwd));
}
