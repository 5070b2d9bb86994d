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

// `from` and `out` are rows of grad_out, or what was made of it, and of the result, null where there was no ReLU.
// Returns the sums of all channels; none where they are not wanted.
inline Tensor drelu_bgrad(const Tensor& grad_out, const Rows& from, const Rows& out,
                          const std::vector<DreluBranch>& branches, int64_t rows, bool wants_sums,
                          ScalarType sums_type) {
  const DType dtype = dtype_of("drelu_bgrad", "grad_out", grad_out);
  int64_t total = 0;
  for (const DreluBranch& branch : branches) total += branch.channels;
  const int64_t columns = wants_sums ? total : 0;
  const RowTasks tasks(rows, total);
  const auto partial = tasks.partial_sums(columns * sizeof(double), [&](int64_t begin, int64_t end, char* bytes) {
    double* const sums = wants_sums ? reinterpret_cast<double*>(bytes) : nullptr;
    for (const DreluBranch& b : branches) FUSED_CNN_PICK(drelu_bgrad)(dtype, from, out, b, begin, end, sums);
  });
  std::vector<double> sums(columns, 0.0);
  const double* next = reinterpret_cast<const double*>(partial.get());
  for (int64_t task = 0; task < tasks.count; ++task) {
    for (double& sum_of_column : sums) sum_of_column += *next++;
  }
  const Tensor result = empty_vector(grad_out, columns, sums_type);
  with_type(dtype_of("drelu_bgrad", "the sums", result), [&](auto element) {
    auto* to = static_cast<decltype(element)*>(result.data_ptr());
    for (const double sum : sums) from_compute(static_cast<compute_t<decltype(element)>>(sum), to++);
  });
  return result;
}

}  // namespace fused_cnn
