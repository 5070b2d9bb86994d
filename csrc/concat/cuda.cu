// fused_cnn::concat_bias_relu_fwd and _bwd on CUDA: all branches in one launch, each element read once and written
// once.
#include <optional>
#include <tuple>
#include "cuda/bias_residual_relu.cuh"
#include "cuda/drelu_bgrad.cuh"

namespace fused_cnn {
namespace {

Tensor concat_bias_relu_fwd(const std::vector<Tensor>& branches, const std::optional<Tensor>& bias, bool relu) {
  const char* op = "concat_bias_relu_fwd";
  const int64_t total = check_branches(op, branches);
  const DType dtype = dtype_of(op, "branch 0", branches[0]);
  const Launch launch(branches[0]);
  const Tensor vector = bias ? checked_vector(op, "bias", *bias, total, branches[0], vector_dtype(dtype)) : Tensor();
  std::vector<RowView> views;
  for (const Tensor& branch : branches) views.push_back(rows_of(branch));
  const RowResult out(branches[0], total, result_format(branches[0]));
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    using B = compute_t<T>;
    std::vector<EpilogueBranch<T, B>> list;
    int64_t first = 0;
    for (size_t i = 0; i < branches.size(); ++i) {
      list.push_back({.y = static_cast<const T*>(views[i].data),
                      .y_pitch = views[i].stride,
                      .bias = bias ? data_of<B>(vector) + first : nullptr,
                      .out = static_cast<T*>(out.data) + first,
                      .out_pitch = total,
                      .channels = branches[i].size(1)});
      first += branches[i].size(1);
    }
    bias_residual_relu(launch, list, relu, row_count(branches[0]));
  });
  return out.finish();
}

std::tuple<std::vector<Tensor>, Tensor> concat_bias_relu_bwd(const Tensor& grad_out, const std::optional<Tensor>& out,
                                                             const std::vector<int64_t>& channels, bool bias) {
  const char* op = "concat_bias_relu_bwd";
  const int64_t total = check_concatenation(op, grad_out, out, channels);
  const DType dtype = dtype_of(op, "grad_out", grad_out);
  const Launch launch(grad_out);
  const RowView grad = rows_of(grad_out);
  const RowView outs = out ? rows_of(*out) : RowView{};
  const Tensor grad_bias = empty_vector(grad_out, bias ? total : 0, vector_dtype(dtype));
  std::vector<RowResult> results;
  for (const int64_t c : channels) results.emplace_back(grad_out, c, result_format(out ? *out : grad_out));
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    std::vector<DreluBranch<T>> list;
    int64_t first = 0;
    for (size_t i = 0; i < channels.size(); ++i) {
      list.push_back({.grad = static_cast<T*>(results[i].data), .channels = channels[i], .first = first});
      first += channels[i];
    }
    drelu_bgrad(launch, grad, outs, list, bias ? data_of<compute_t<T>>(grad_bias) : nullptr, row_count(grad_out));
  });
  std::vector<Tensor> grads;
  for (const RowResult& result : results) grads.push_back(result.finish());
  return {grads, grad_bias};
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("concat_bias_relu_fwd", FUSED_CNN_BOX(&fused_cnn::concat_bias_relu_fwd));
  m.impl("concat_bias_relu_bwd", FUSED_CNN_BOX(&fused_cnn::concat_bias_relu_bwd));
}
