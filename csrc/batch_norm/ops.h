// fused_cnn::bn_stats, bn_relu_concat_fwd, _bwd, bn_add_relu_fwd and _bwd on either device: everything is checked
// before any memory is touched, activations become rows of channels, and the device's own part runs on them.
#pragma once
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>
#include "batch_norm/branch.h"
#include "batch_norm/math.h"
#include "shared/rows.h"

namespace fused_cnn {

using Tensors = std::vector<Tensor>;

// Normalised inputs as rows of channels, with their statistics and parameters: checked, and kept alive. Each is a
// branch that has no place yet.
struct NormalizedInputs {
  int64_t total, rows;
  DType dtype;
  Tensor mean, rstd;
  std::vector<RowView> views;
  Tensors weights, biases;
  std::vector<BnBranch> branches;

  NormalizedInputs(const char* op, const Tensors& xs, const Tensor& mean_, const Tensor& rstd_, const Tensors& weights_,
                   const Tensors& biases_)
      : total(check_branches(op, xs)), rows(row_count(xs[0])), dtype(dtype_of(op, "x", xs[0])) {
    FUSED_CNN_CHECK(weights_.size() == xs.size() && biases_.size() == xs.size(), op,
                    ": expected one weight and one bias for each of ", xs.size(), " inputs, got ", weights_.size(),
                    " and ", biases_.size());
    const auto checked = [&](const char* name, const Tensor& vector, int64_t channels) {
      return checked_vector(op, name, vector, channels, xs[0], vector_dtype(dtype));
    };
    mean = checked("mean", mean_, total);
    rstd = checked("rstd", rstd_, total);
    const auto from = [&](const Tensor& vector, int64_t channel) {
      return at(vector.data_ptr(), channel, vector.element_size());
    };
    int64_t first = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      const int64_t channels = xs[i].size(1);
      views.push_back(rows_of(xs[i]));
      weights.push_back(checked("weight", weights_[i], channels));
      biases.push_back(checked("bias", biases_[i], channels));
      branches.push_back({.channels = channels,
                          .first = first,
                          .in = {{.x = views[i],
                                  .mean = from(mean, first),
                                  .rstd = from(rstd, first),
                                  .weight = weights[i].data_ptr(),
                                  .bias = biases[i].data_ptr()}}});
      first += channels;
    }
  }

  Tensor empty_like_mean(int64_t size) const { return empty_vector(mean, size, mean.scalar_type()); }

  // Each input beside its channels of y.
  std::vector<BnBranch> concatenated(const RowView& y) const {
    std::vector<BnBranch> placed = branches;
    for (BnBranch& branch : placed) branch.y = y.from(branch.first);
    return placed;
  }

  // The first input with the second, or with a plain residual's rows, at y.
  BnBranch added(const Rows& residual, const Rows& y) const {
    BnBranch branch = branches[0];
    branch.in[1] = branches.size() > 1 ? branches[1].in[0] : BnInput{.x = residual};
    branch.y = y;
    return branch;
  }
};

// The device's own part. Mean, 1 / sqrt(biased variance + eps) and unbiased variance of all the branches' channels.
void bn_statistics(DType dtype, const std::vector<BnBranch>& branches, int64_t rows, const Tensor& mean,
                   const Tensor& rstd, const Tensor& var);
// y = bn(x), plus the residual, under ReLU; with a plain residual, ReLU's mask to `mask`, unless null.
void bn_forward(const NormalizedInputs& in, std::vector<BnBranch> branches, Residual residual, bool relu,
                uint8_t* mask);
// The branches' gradients; returns those of weight and bias. A plain residual's is the gradient under `mask`.
std::tuple<Tensor, Tensor> bn_backward(const NormalizedInputs& in, std::vector<BnBranch> branches, Residual residual,
                                       bool relu, const uint8_t* mask);

inline std::tuple<Tensor, Tensor, Tensor> bn_stats(const Tensors& xs, const std::vector<double>& eps) {
  const char* op = "bn_stats";
  const int64_t total = check_branches(op, xs), rows = row_count(xs[0]);
  FUSED_CNN_CHECK(eps.size() == xs.size(), op, ": expected one eps for each of ", xs.size(), " inputs, got ",
                  eps.size());
  FUSED_CNN_CHECK(rows > 0, op, ": an empty batch has no statistics, got ", shape_of(xs[0]));
  const DType dtype = dtype_of(op, "x", xs[0]);
  const auto vector = [&] { return empty_vector(xs[0], total, vector_dtype(dtype)); };
  const Tensor mean = vector(), rstd = vector(), var = vector();
  std::vector<RowView> views;
  std::vector<BnBranch> branches;
  int64_t first = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    views.push_back(rows_of(xs[i]));
    branches.push_back({.channels = xs[i].size(1), .first = first, .in = {{.x = views[i]}}, .eps = eps[i]});
    first += xs[i].size(1);
  }
  bn_statistics(dtype, branches, rows, mean, rstd, var);
  return {mean, rstd, var};
}

inline Tensor bn_relu_concat_fwd(const Tensors& xs, const Tensor& mean, const Tensor& rstd, const Tensors& weights,
                                 const Tensors& biases, bool relu) {
  const NormalizedInputs in("bn_relu_concat_fwd", xs, mean, rstd, weights, biases);
  const RowResult out(xs[0], in.total, result_format(xs[0]));
  bn_forward(in, in.concatenated(out), Residual::none, relu, /*mask=*/nullptr);
  return out.finish();
}

// The backwards' own arguments, for `channels` of the result and so many normalised inputs.
inline void check_gradient(const char* op, const Tensor& grad_out, const Tensor& x, int64_t channels,
                           const std::vector<bool>& training, size_t inputs) {
  FUSED_CNN_CHECK(training.size() == inputs, op, ": expected one training flag for each of ", inputs, " inputs, got ",
                  training.size());
  check_result_shape(op, "grad_out", grad_out, x, channels, x.size(2), x.size(3));
}

inline std::tuple<Tensors, Tensor, Tensor> bn_relu_concat_bwd(const Tensor& grad_out, const Tensors& xs,
                                                              const Tensor& mean, const Tensor& rstd,
                                                              const Tensors& weights, const Tensors& biases,
                                                              const std::vector<bool>& training, bool relu) {
  const char* op = "bn_relu_concat_bwd";
  const NormalizedInputs in(op, xs, mean, rstd, weights, biases);
  check_gradient(op, grad_out, xs[0], in.total, training, xs.size());
  const RowView grad = rows_of(grad_out);
  std::vector<BnBranch> branches = in.concatenated(grad);
  std::vector<RowResult> grad_xs;
  for (size_t i = 0; i < xs.size(); ++i) {
    grad_xs.emplace_back(xs[i], xs[i].size(1), result_format(xs[i]));
    branches[i].grad[0] = grad_xs[i].data;
    branches[i].training[0] = training[i];
  }
  const auto [grad_weight, grad_bias] = bn_backward(in, branches, Residual::none, relu, /*mask=*/nullptr);
  return {finished(grad_xs), grad_weight, grad_bias};
}

// x and the residual of bn_add_relu, checked. Returns those that are normalised, by the number of weights: x, or both.
inline Tensors normalized_inputs(const char* op, const Tensor& x, const std::optional<Tensor>& residual, size_t count) {
  check_4d(op, "x", x);
  if (residual) check_like(op, "x", x, "residual", *residual);
  FUSED_CNN_CHECK(count == 1 || count == 2, op, ": expected one weight (for x) or two (for x and residual), got ",
                  count);
  FUSED_CNN_CHECK(count == 1 || residual.has_value(), op, ": a normalised residual is needed, got none");
  return count == 1 ? Tensors{x} : Tensors{x, *residual};
}

inline std::tuple<Tensor, Tensor> bn_add_relu_fwd(const Tensor& x, const Tensor& residual, const Tensor& mean,
                                                  const Tensor& rstd, const Tensors& weights, const Tensors& biases,
                                                  bool save_mask) {
  const char* op = "bn_add_relu_fwd";
  const NormalizedInputs in(op, normalized_inputs(op, x, residual, weights.size()), mean, rstd, weights, biases);
  const bool plain = weights.size() == 1;
  const RowView added = rows_of(residual);
  const RowResult out(x, x.size(1), result_format(x));
  const bool masked = plain && save_mask;
  const int64_t mask_sizes[] = {masked ? in.rows : 0, mask_bytes(x.size(1))};
  const Tensor mask =
      torch::stable::empty(mask_sizes, ScalarType::Byte, torch::headeronly::Layout::Strided, x.device());
  bn_forward(in, {in.added(added, out)}, plain ? Residual::plain : Residual::normalized, /*relu=*/true,
             masked ? data_of<uint8_t>(mask) : nullptr);
  return {out.finish(), mask};
}

inline Tensor checked_mask(const char* op, const std::optional<Tensor>& mask, const Tensor& x) {
  const int64_t rows = row_count(x), bytes = mask_bytes(x.size(1));
  FUSED_CNN_CHECK(mask.has_value(), op, ": the forward's mask is needed, got none");
  FUSED_CNN_CHECK(mask->scalar_type() == ScalarType::Byte && mask->dim() == 2 && mask->size(0) == rows &&
                      mask->size(1) == bytes && mask->is_cuda() == x.is_cuda() &&
                      mask->get_device_index() == x.get_device_index(),
                  op, ": mask must be uint8 of shape (", rows, ", ", bytes, ") on the device of x, got ",
                  torch::headeronly::toString(mask->scalar_type()), " ", shape_of(*mask));
  return torch::stable::contiguous(*mask);
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_relu_bwd(const Tensor& grad_out, const Tensor& x,
                                                                  const std::optional<Tensor>& residual,
                                                                  const std::optional<Tensor>& mask, const Tensor& mean,
                                                                  const Tensor& rstd, const Tensors& weights,
                                                                  const Tensors& biases,
                                                                  const std::vector<bool>& training) {
  const char* op = "bn_add_relu_bwd";
  const NormalizedInputs in(op, normalized_inputs(op, x, residual, weights.size()), mean, rstd, weights, biases);
  check_gradient(op, grad_out, x, x.size(1), training, weights.size());
  const bool plain = weights.size() == 1;
  const Tensor kept = plain ? checked_mask(op, mask, x) : Tensor();
  const RowView grad = rows_of(grad_out);
  const RowResult grad_x(x, x.size(1), result_format(x)), grad_residual(x, x.size(1), result_format(x));
  BnBranch branch = in.added(/*residual=*/{}, grad);
  branch.grad[0] = grad_x.data;
  branch.grad[1] = grad_residual.data;
  std::copy(training.begin(), training.end(), branch.training);
  const auto [grad_weight, grad_bias] = bn_backward(in, {branch}, plain ? Residual::plain : Residual::normalized,
                                                    /*relu=*/true, plain ? data_of<uint8_t>(kept) : nullptr);
  return {grad_x.finish(), grad_residual.finish(), grad_weight, grad_bias};
}

}  // namespace fused_cnn
