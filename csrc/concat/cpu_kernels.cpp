// The loops of concat_bias_relu over rows of one branch: forward reads the branch and writes its channels of
// the output; backward reads those channels of grad_out and of out, writes the branch's gradient and adds up
// the bias's.
#include "concat/cpu_kernels.h"
#include "cpu/chunk.h"
#include "cpu/simd.h"
#include "shared/relu.h"

namespace fused_cnn::FUSED_CNN_LEVEL {
namespace {

template <typename T, bool Relu>
void forward(const T* x, int64_t x_stride, const compute_t<T>* bias, T* out, int64_t out_stride, int64_t channels,
             int64_t rows) {
  using C = compute_t<T>;
  row_groups(rows, channels * sizeof(T), [&](int64_t r, auto group) FUSED_CNN_INLINE {
    columns<C>(channels, [&](int64_t c, auto used) FUSED_CNN_INLINE {
      const Vec<C> b = bias ? load(bias + c, used) : Vec<C>{};
      for (int64_t k = r; k < r + decltype(group)::n; ++k) {
        const Vec<C> v = load(x + k * x_stride + c, used);
        if constexpr (Relu) store(relu(v + b), out + k * out_stride + c, used);
        if constexpr (!Relu) store(v + b, out + k * out_stride + c, used);
      }
    });
  });
}

template <typename T, bool Relu, bool Sum>
void backward(const T* grad_out, int64_t grad_stride, const T* out, int64_t out_stride, T* grad_x, compute_t<T>* sums,
              int64_t channels, int64_t rows) {
  using C = compute_t<T>;
  row_groups(rows, channels * sizeof(T), [&](int64_t r, auto group) FUSED_CNN_INLINE {
    columns<C>(channels, [&](int64_t c, auto used) FUSED_CNN_INLINE {
      Vec<C> total{};
      for (int64_t k = r; k < r + decltype(group)::n; ++k) {
        Vec<C> g = load(grad_out + k * grad_stride + c, used);
        if constexpr (Relu) g = relu_grad(g, load(out + k * out_stride + c, used));
        store(g, grad_x + k * channels + c, used);
        total = total + g;
      }
      if constexpr (Sum) store(load(sums + c, used) + total, sums + c, used);
    });
  });
}

}  // namespace

void concat_fwd(DType dtype, const void* x, int64_t x_stride, const void* bias, bool use_relu, void* out,
                int64_t out_stride, int64_t channels, int64_t rows) {
  FUSED_CNN_DISPATCH(dtype, T, {
    const auto call = use_relu ? forward<T, true> : forward<T, false>;
    call(static_cast<const T*>(x), x_stride, static_cast<const compute_t<T>*>(bias), static_cast<T*>(out), out_stride,
         channels, rows);
  })
}

void concat_bwd(DType dtype, const void* grad_out, int64_t grad_stride, const void* out, int64_t out_stride,
                void* grad_x, void* sums, int64_t channels, int64_t rows) {
  FUSED_CNN_DISPATCH(dtype, T, {
    const auto call = out ? (sums ? backward<T, true, true> : backward<T, true, false>)
                          : (sums ? backward<T, false, true> : backward<T, false, false>);
    call(static_cast<const T*>(grad_out), grad_stride, static_cast<const T*>(out), out_stride, static_cast<T*>(grad_x),
         static_cast<compute_t<T>*>(sums), channels, rows);
  })
}

}  // namespace fused_cnn::FUSED_CNN_LEVEL
