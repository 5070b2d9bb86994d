// The loops of cpu_kernels.h on tensors, on every thread.
#pragma once
#include <vector>
#include "cpu/cpu_kernels.h"
#include "cpu/parallel.h"
#include "shared/rows.h"

namespace fused_cnn {

// From a channel on.
inline Rows rows_at(const RowView& view, int64_t channel = 0) {
  return {at(view.data, channel, view.tensor.element_size()), view.stride};
}
inline Rows rows_at(const RowResult& result, int64_t channel = 0) {
  return {at(result.data, channel, result.tensor.element_size()), result.tensor.size(1)};
}

// Dense memory from an element on, as one row.
inline Rows elements_at(const Tensor& t, int64_t element) {
  return {at(t.data_ptr(), element, t.element_size()), 0};
}

// out = act(y + residual) for dense tensors of one memory format; out may be y.
inline void residual_relu(DType dtype, const Tensor& y, const std::optional<Tensor>& residual, bool relu,
                          const Tensor& out) {
  parallel_elements(out.numel(), [&](int64_t begin, int64_t end) {
    const BiasResidualRelu row{.y = elements_at(y, begin),
                               .residual = residual ? elements_at(*residual, begin) : Rows{},
                               .out = elements_at(out, begin),
                               .relu = relu,
                               .channels = end - begin};
    FUSED_CNN_PICK(bias_residual_relu)(dtype, row, 0, 1);
  });
}

// Runs drelu_bgrad over the rows of branches that lie side by side in grad_out. Returns the sums of all their channels,
// none where they are not wanted.
inline std::vector<double> masked_gradient(DType dtype, const std::vector<DreluBgrad>& branches, int64_t rows,
                                           bool sum) {
  int64_t total = 0;
  for (const DreluBgrad& branch : branches) total += branch.channels;
  const int64_t columns = sum ? total : 0;
  const RowTasks tasks(rows, total);
  const auto partial = tasks.partial_sums(columns * sizeof(double), [&](int64_t begin, int64_t end, char* bytes) {
    double* sums = sum ? reinterpret_cast<double*>(bytes) : nullptr;
    for (const DreluBgrad& branch : branches) {
      FUSED_CNN_PICK(drelu_bgrad)(dtype, branch, begin, end, sums);
      if (sum) sums += branch.channels;
    }
  });
  std::vector<double> sums(columns, 0.0);
  const double* from = reinterpret_cast<const double*>(partial.get());
  for (int64_t task = 0; task < tasks.count; ++task) {
    for (double& sum_of_column : sums) sum_of_column += *from++;
  }
  return sums;
}

inline Tensor vector_of(const std::vector<double>& values, const Tensor& like, ScalarType dtype) {
  const Tensor vector = empty_vector(like, static_cast<int64_t>(values.size()), dtype);
  with_type(dtype_of("vector_of", "vector", vector), [&](auto element) {
    auto* to = static_cast<decltype(element)*>(vector.data_ptr());
    for (const double value : values) from_compute(static_cast<compute_t<decltype(element)>>(value), to++);
  });
  return vector;
}

}  // namespace fused_cnn
