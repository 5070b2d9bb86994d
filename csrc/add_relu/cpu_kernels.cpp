// The element-wise loops of add_relu. Forward reads x and residual and writes out; backward reads grad_out and out and
// writes one gradient, which both inputs share.
#include "add_relu/cpu_kernels.h"
#include "add_relu/math.h"
#include "cpu/chunk.h"

namespace fused_cnn::FUSED_CNN_LEVEL {
namespace {

template <typename T, typename Op>
void binary(const T* a, const T* b, T* out, int64_t n, Op op) {
  ChunkIn<T> in_a, in_b;
  ChunkOut<T> result;
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t m = n - i < kChunk ? n - i : kChunk;
    const auto* va = in_a.load(a + i, m);
    const auto* vb = in_b.load(b + i, m);
    auto* v = result.at(out + i);
#pragma GCC ivdep
    for (int64_t j = 0; j < m; ++j) v[j] = op(va[j], vb[j]);
    result.store(out + i, m);
  }
}

}  // namespace

void add_relu_fwd(DType dtype, const void* x, const void* residual, void* out, int64_t n) {
  FUSED_CNN_DISPATCH(dtype, T,
                     binary(static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<T*>(out), n,
                            [](auto a, auto b) { return add_relu::forward(a, b); }))
}

void add_relu_bwd(DType dtype, const void* grad_out, const void* out, void* grad, int64_t n) {
  FUSED_CNN_DISPATCH(dtype, T,
                     binary(static_cast<const T*>(grad_out), static_cast<const T*>(out), static_cast<T*>(grad), n,
                            [](auto g, auto o) { return add_relu::backward(g, o); }))
}

}  // namespace fused_cnn::FUSED_CNN_LEVEL
