// The convolution epilogue in place (reads out and residual, writes out), and its gradient: one pass over grad_out and
// out that writes the masked gradient and adds up its columns. Sums are kept in float for a few rows at a time and then
// in double.
#include "cpu/cpu_kernels.h"
#include "cpu/chunk.h"
#include "shared/relu.h"

namespace fused_cnn::FUSED_CNN_LEVEL {
namespace {

template <typename T>
void epilogue_t(T* out, const T* residual, int64_t n, bool relu_on) {
  using C = compute_t<T>;
  ChunkIn<T> in, in_residual;
  ChunkOut<T> result;
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t m = n - i < kChunk ? n - i : kChunk;
    const C* v = in.load(out + i, m);
    C* to = result.at(out + i);
    if (residual != nullptr) {
      const C* r = in_residual.load(residual + i, m);
      for (int64_t j = 0; j < m; ++j) to[j] = v[j] + r[j];
      v = to;
    }
    if (relu_on) {
      for (int64_t j = 0; j < m; ++j) to[j] = relu(v[j]);
    } else if (v != to) {
      for (int64_t j = 0; j < m; ++j) to[j] = v[j];
    }
    result.store(out + i, m);
  }
}

constexpr int64_t kRowsPerSum = 64;

template <typename T>
void mask_and_sum_t(const T* grad_out, const T* out, T* grad, double* sums, int64_t begin, int64_t end,
                    int64_t channels) {
  using C = compute_t<T>;
  ChunkIn<T> in_grad, in_out;
  ChunkOut<T> result;
  C scratch[kChunk];
  C partial[kChunk];
  for (int64_t c0 = 0; c0 < channels; c0 += kChunk) {
    const int64_t m = channels - c0 < kChunk ? channels - c0 : kChunk;
    for (int64_t r0 = begin; r0 < end; r0 += kRowsPerSum) {
      const int64_t r1 = end - r0 < kRowsPerSum ? end : r0 + kRowsPerSum;
      for (int64_t j = 0; j < m; ++j) partial[j] = C(0);
      for (int64_t r = r0; r < r1; ++r) {
        const int64_t i = r * channels + c0;
        const C* g = in_grad.load(grad_out + i, m);
        C* to = grad != nullptr ? result.at(grad + i) : scratch;
        if (out != nullptr) {
          const C* o = in_out.load(out + i, m);
          for (int64_t j = 0; j < m; ++j) to[j] = relu_grad(g[j], o[j]);
        } else {
          for (int64_t j = 0; j < m; ++j) to[j] = g[j];
        }
        for (int64_t j = 0; j < m; ++j) partial[j] += to[j];
        if (grad != nullptr) result.store(grad + i, m);
      }
      for (int64_t j = 0; j < m; ++j) sums[c0 + j] += static_cast<double>(partial[j]);
    }
  }
}

}  // namespace

void epilogue(DType dtype, void* out, const void* residual, int64_t n, bool relu) {
  FUSED_CNN_DISPATCH(dtype, T, epilogue_t(static_cast<T*>(out), static_cast<const T*>(residual), n, relu))
}

void mask_and_sum(DType dtype, const void* grad_out, const void* out, void* grad, double* sums, int64_t begin,
                  int64_t end, int64_t channels) {
  FUSED_CNN_DISPATCH(dtype, T,
                     mask_and_sum_t(static_cast<const T*>(grad_out), static_cast<const T*>(out), static_cast<T*>(grad),
                                    sums, begin, end, channels))
}

}  // namespace fused_cnn::FUSED_CNN_LEVEL
