// The two passes that several rooms share, on the device that this is compiled for: bias_residual_relu, which is what
// follows a convolution, and its gradient drelu_bgrad (branches.h).
#pragma once
#ifdef USE_CUDA
#include "cuda/bias_residual_relu.cuh"
#include "cuda/drelu_bgrad.cuh"
#else
#include "cpu/passes.h"
#endif

namespace fused_cnn {

// pass(of, width, rows) over dense tensors of n elements in one layout, whichever that is: of(tensor) is its memory as
// rows of so many elements, then the rest as one row.
template <typename Pass>
void for_elements(int64_t n, const Pass& pass) {
  const auto run = [&](int64_t first, int64_t width, int64_t rows) {
    pass([&](const Tensor& t) { return Rows{at(t.data_ptr(), first, t.element_size()), width}; }, width, rows);
  };
  const int64_t rest = n % kDenseWidth;
  if (n >= kDenseWidth) run(0, kDenseWidth, n / kDenseWidth);
  if (rest > 0) run(n - rest, rest, 1);
}

}  // namespace fused_cnn
