// The loops of cpu_kernels.h on tensors, on every thread.
#pragma once
#include "cpu/cpu_kernels.h"
#include "cpu/parallel.h"
#include "shared/rows.h"

namespace fused_cnn {

constexpr int64_t kDenseWidth = 1024;  // of a row of dense memory that has no channels (shared/passes.h)

// Rows of branches that lie side by side in a result like x, but for its channels.
inline void bias_residual_relu(const Tensor& x, const std::vector<BiasResidualRelu>& branches, bool relu,
                               int64_t rows) {
  const DType dtype = dtype_of("bias_residual_relu", "x", x);
  int64_t total = 0;
  for (const BiasResidualRelu& branch : branches) total += branch.channels;
  parallel_row_blocks(rows, total, [&](int64_t begin, int64_t end) {
    for (const BiasResidualRelu& b : branches) FUSED_CNN_PICK(bias_residual_relu)(dtype, b, relu, begin, end);
  });
}

// Rows of branches that lie side by side in grad_out. Returns the sums of all their channels; none where they are not
// wanted.
inline Tensor drelu_bgrad(const Tensor& grad_out, const std::vector<DreluBgrad>& branches, int64_t rows,
                          bool wants_sums, ScalarType sums_type) {
  const DType dtype = dtype_of("drelu_bgrad", "grad_out", grad_out);
  int64_t total = 0;
  for (const DreluBgrad& branch : branches) total += branch.channels;
  const int64_t columns = wants_sums ? total : 0;
  const RowTasks tasks(rows, total);
  const auto partial = tasks.partial_sums(columns * sizeof(double), [&](int64_t begin, int64_t end, char* sums) {
    for (const DreluBgrad& b : branches) {
      double* const of_branch = wants_sums ? reinterpret_cast<double*>(sums) + b.first : nullptr;
      FUSED_CNN_PICK(drelu_bgrad)(dtype, b, begin, end, of_branch);
    }
  });
  std::vector<double> sums(columns, 0.0);
  const double* from = reinterpret_cast<const double*>(partial.get());
  for (int64_t task = 0; task < tasks.count; ++task) {
    for (double& sum_of_column : sums) sum_of_column += *from++;
  }
  const Tensor result = empty_vector(grad_out, columns, sums_type);
  with_type(dtype_of("drelu_bgrad", "the sums", result), [&](auto element) {
    auto* to = static_cast<decltype(element)*>(result.data_ptr());
    for (const double sum : sums) from_compute(static_cast<compute_t<decltype(element)>>(sum), to++);
  });
  return result;
}

}  // namespace fused_cnn
