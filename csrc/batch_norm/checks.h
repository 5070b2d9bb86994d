// What batch_norm's backends check alike before any memory is touched.
#pragma once
#include <optional>
#include <vector>
#include "batch_norm/math.h"
#include "shared/rows.h"

namespace fused_cnn {

using Tensors = std::vector<Tensor>;

// x and the residual of bn_add_relu, checked. Returns those that are normalised, by the number of weights: x, or both.
inline Tensors normalized_inputs(const char* op, const Tensor& x, const std::optional<Tensor>& residual, size_t count) {
  check_4d(op, "x", x);
  if (residual) check_like(op, "x", x, "residual", *residual);
  FUSED_CNN_CHECK(count == 1 || count == 2, op, ": expected one weight (for x) or two (for x and residual), got ",
                  count);
  FUSED_CNN_CHECK(count == 1 || residual.has_value(), op, ": a normalised residual is needed, got none");
  return count == 1 ? Tensors{x} : Tensors{x, *residual};
}

// Normalised inputs as rows of channels, with their statistics and parameters: checked, and kept alive. The channels of
// input i begin at first[i] of all `total`.
struct NormalizedInputs {
  int64_t total, rows;
  DType dtype;
  ScalarType vector_type;
  Tensor mean, rstd;
  std::vector<RowView> views;
  Tensors weights, biases;
  std::vector<int64_t> first;

  NormalizedInputs(const char* op, const Tensors& xs, const Tensor& mean_, const Tensor& rstd_, const Tensors& weights_,
                   const Tensors& biases_)
      : total(check_branches(op, xs)),
        rows(row_count(xs[0])),
        dtype(dtype_of(op, "x", xs[0])),
        vector_type(vector_dtype(dtype)) {
    FUSED_CNN_CHECK(weights_.size() == xs.size() && biases_.size() == xs.size(), op,
                    ": expected one weight and one bias for each of ", xs.size(), " inputs, got ", weights_.size(),
                    " and ", biases_.size());
    const auto checked = [&](const char* name, const Tensor& vector, int64_t channels) {
      return checked_vector(op, name, vector, channels, xs[0], vector_type);
    };
    mean = checked("mean", mean_, total);
    rstd = checked("rstd", rstd_, total);
    int64_t begin = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      const int64_t channels = xs[i].size(1);
      views.push_back(rows_of(xs[i]));
      weights.push_back(checked("weight", weights_[i], channels));
      biases.push_back(checked("bias", biases_[i], channels));
      first.push_back(begin);
      begin += channels;
    }
  }
  Tensor empty_like_mean(int64_t size) const { return empty_vector(mean, size, vector_type); }
};

// Statistics need rows. Returns the number of channels.
inline int64_t check_statistics(const char* op, const Tensors& xs, const std::vector<double>& eps) {
  const int64_t total = check_branches(op, xs);
  FUSED_CNN_CHECK(eps.size() == xs.size(), op, ": expected one eps for each of ", xs.size(), " inputs, got ",
                  eps.size());
  FUSED_CNN_CHECK(row_count(xs[0]) > 0, op, ": an empty batch has no statistics, got ", shape_of(xs[0]));
  return total;
}

// The backward's own arguments, for `channels` of the result and so many normalised inputs.
inline void check_gradient(const char* op, const Tensor& grad_out, const Tensor& x, int64_t channels,
                           const std::vector<bool>& training, size_t inputs) {
  FUSED_CNN_CHECK(training.size() == inputs, op, ": expected one training flag for each of ", inputs, " inputs, got ",
                  training.size());
  check_result_shape(op, "grad_out", grad_out, x, channels, x.size(2), x.size(3));
}

inline Tensor empty_mask(const Tensor& x, int64_t rows) {
  const int64_t sizes[] = {rows, mask_bytes(x.size(1))};
  return torch::stable::empty(sizes, ScalarType::Byte, torch::headeronly::Layout::Strided, x.device());
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

}  // namespace fused_cnn
