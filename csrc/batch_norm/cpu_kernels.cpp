// The loops of batch_norm over rows of channels_last memory. bn_moments reads x once from memory (each block
// twice, the second time from cache); bn_apply reads each input and writes the output; bn_reduce reads the
// gradient and each input and adds up two or three sums per channel; bn_grad_input reads them again and
// writes each input's gradient.
#include "batch_norm/cpu_kernels.h"
#include "batch_norm/bits.h"
#include "batch_norm/math.h"
#include "cpu/chunk.h"
#include "cpu/simd.h"

namespace fused_cnn::FUSED_CNN_LEVEL {
namespace {

constexpr int64_t kStrip = 1024;  // channels whose moments are found together: their sums fit the first-level cache
constexpr int64_t kBlockElements =
    16384;  // rows whose mean and squared differences are found together fit the second-level one

template <typename C>
C* as(const void* p) {
  return static_cast<C*>(const_cast<void*>(p));
}

// sum[c] += term(x[r][c]) over rows.
template <typename T, typename C, typename Term>
void add_rows(const T* x, int64_t stride, int64_t channels, int64_t rows, C* sum, const Term& term) {
  row_groups(rows, channels * sizeof(T), [&](int64_t r, auto group) FUSED_CNN_INLINE {
    constexpr int n = decltype(group)::n;
    columns<C>(channels, [&](int64_t c, auto used) FUSED_CNN_INLINE {
      Vec<C> v[n];
      for (int k = 0; k < n; ++k) v[k] = term(load(x + (r + k) * stride + c, used), c, used);
      for (int k = 1; k < n; ++k) v[0] = v[0] + v[k];
      store(load(sum + c, used) + v[0], sum + c, used);
    });
  });
}

template <typename T>
void moments(const T* x, int64_t stride, int64_t channels, int64_t rows, compute_t<T>* mean, compute_t<T>* m2) {
  using C = compute_t<T>;
  C block_mean[kStrip], block_m2[kStrip];
  for (int64_t first = 0; first < channels; first += kStrip) {
    const int64_t width = channels - first < kStrip ? channels - first : kStrip;
    const int64_t block = kBlockElements / width;
    for (int64_t done = 0; done < rows; done += block) {
      const int64_t n = rows - done < block ? rows - done : block;
      const T* in = x + done * stride + first;
      for (int64_t c = 0; c < width; ++c) block_mean[c] = block_m2[c] = C(0);
      add_rows(in, stride, width, n, block_mean, [](Vec<C> v, int64_t, auto) FUSED_CNN_INLINE { return v; });
      for (int64_t c = 0; c < width; ++c) block_mean[c] /= C(n);
      add_rows(in, stride, width, n, block_m2, [&](Vec<C> v, int64_t c, auto used) FUSED_CNN_INLINE {
        const Vec<C> delta = v - load(block_mean + c, used);
        return delta * delta;
      });
      if (done == 0) {
        for (int64_t c = 0; c < width; ++c) {
          mean[first + c] = block_mean[c];
          m2[first + c] = block_m2[c];
        }
      } else {
        const C share = C(n) / C(done + n), product = C(done) * share;
        for (int64_t c = 0; c < width; ++c) {
          batch_norm::merge_moments(mean[first + c], m2[first + c], block_mean[c], block_m2[c], share, product);
        }
      }
    }
  }
}

// An input's vectors for one group of columns.
template <typename C>
struct Channels {
  Vec<C> mean, scale, bias;

  template <typename Used>
  FUSED_CNN_INLINE Channels(const BnInput& in, int64_t c, Used used)
      : mean(load(as<const C>(in.mean) + c, used)),
        scale(load(as<const C>(in.scale) + c, used)),
        bias(load(as<const C>(in.bias) + c, used)) {}
  FUSED_CNN_INLINE Vec<C> normalize(Vec<C> x) const { return batch_norm::normalize(x, mean, scale, bias); }
};

template <typename T, int Inputs, bool Residual, bool Relu>
void apply(const BnInput* inputs, const T* residual, int64_t residual_stride, BnRows result, int64_t channels,
           int64_t rows) {
  using C = compute_t<T>;
  const BnInput in0 = inputs[0], in1 = inputs[Inputs - 1];
  const int64_t bits_stride = (channels + 7) / 8;
  row_groups(rows, channels * sizeof(T), [&](int64_t r, auto group) FUSED_CNN_INLINE {
    columns<C>(channels, [&](int64_t c, auto used) FUSED_CNN_INLINE {
      const Channels<C> of0(in0, c, used), of1(in1, c, used);
      for (int64_t k = r; k < r + decltype(group)::n; ++k) {
        Vec<C> v = of0.normalize(load(as<const T>(in0.x) + k * in0.stride + c, used));
        if constexpr (Inputs == 2) v = v + of1.normalize(load(as<const T>(in1.x) + k * in1.stride + c, used));
        if constexpr (Residual) v = v + load(residual + k * residual_stride + c, used);
        if constexpr (Residual && Relu) {
          if (result.bits) store_bits<C>(v, result.bits + k * bits_stride, c, lanes_used<C>(used));
        }
        if constexpr (Relu) v = relu(v);
        store(v, as<T>(result.data) + k * result.stride + c, used);
      }
    });
  });
}

// How the gradient that ReLU lets through is known.
enum class Mask { none, bits, recompute };

template <typename T, int Inputs, Mask mask, typename Body>
FUSED_CNN_INLINE inline void for_each_gradient(const BnInput& in0, const BnInput& in1, const BnRows& grad_out,
                                               int64_t channels, int64_t rows, const Body& body) {
  using C = compute_t<T>;
  const int64_t bits_stride = (channels + 7) / 8;
  row_groups(rows, channels * sizeof(T), [&](int64_t r, auto group) FUSED_CNN_INLINE {
    constexpr int n = decltype(group)::n;
    columns<C>(channels, [&](int64_t c, auto used) FUSED_CNN_INLINE {
      const Channels<C> of0(in0, c, used), of1(in1, c, used);
      Vec<C> g[n], x0[n], x1[n];
      for (int k = 0; k < n; ++k) {
        g[k] = load(as<const T>(grad_out.data) + (r + k) * grad_out.stride + c, used);
        x0[k] = load(as<const T>(in0.x) + (r + k) * in0.stride + c, used);
        if constexpr (Inputs == 2) x1[k] = load(as<const T>(in1.x) + (r + k) * in1.stride + c, used);
        if constexpr (mask == Mask::bits) {
          g[k] = apply_bits<C>(g[k], grad_out.bits + (r + k) * bits_stride, c, lanes_used<C>(used));
        }
        if constexpr (mask == Mask::recompute) {
          Vec<C> out = of0.normalize(x0[k]);
          if constexpr (Inputs == 2) out = out + of1.normalize(x1[k]);
          g[k] = relu_grad(g[k], out);
        }
      }
      body(r, c, used, group, g, x0, x1, of0, of1);
    });
  });
}

template <typename T, int Inputs, Mask mask>
void reduce(const BnInput* inputs, BnRows grad_out, T* masked, BnSums sums, int64_t channels, int64_t rows) {
  using C = compute_t<T>;
  const auto add = [](C* sum, Vec<C> v, auto used) FUSED_CNN_INLINE { store(load(sum, used) + v, sum, used); };
  const BnInput in0 = inputs[0], in1 = inputs[Inputs - 1];
  C *sum_g = as<C>(sums.grad), *sum_g0 = as<C>(sums.grad_x[0]), *sum_g1 = as<C>(sums.grad_x[Inputs - 1]);
  for_each_gradient<T, Inputs, mask>(in0, in1, grad_out, channels, rows,
                                     [&](int64_t r, int64_t c, auto used, auto group, const Vec<C>* g, const Vec<C>* x0,
                                         const Vec<C>* x1, const Channels<C>& of0, const Channels<C>& of1)
                                         FUSED_CNN_INLINE {
                                           Vec<C> total{}, total0{}, total1{};
                                           for (int k = 0; k < decltype(group)::n; ++k) {
                                             if constexpr (mask == Mask::bits)
                                               store(g[k], masked + (r + k) * channels + c, used);
                                             total = total + g[k];
                                             total0 = total0 + g[k] * (x0[k] - of0.mean);
                                             if constexpr (Inputs == 2) total1 = total1 + g[k] * (x1[k] - of1.mean);
                                           }
                                           add(sum_g + c, total, used);
                                           add(sum_g0 + c, total0, used);
                                           if constexpr (Inputs == 2) add(sum_g1 + c, total1, used);
                                         });
}

template <typename C, typename Used>
FUSED_CNN_INLINE inline Vec<C> input_gradient(const BnGrad& grad, Vec<C> g, Vec<C> x, const Channels<C>& of, int64_t c,
                                              Used used) {
  if (!grad.offset) return g * of.scale;
  return batch_norm::grad_input(g, x, of.mean, of.scale, load(as<const C>(grad.offset) + c, used),
                                load(as<const C>(grad.slope) + c, used));
}

template <typename T, int Inputs, Mask mask>
void grad_input(const BnInput* inputs, BnRows grad_out, const BnGrad* grads, int64_t channels, int64_t rows) {
  using C = compute_t<T>;
  const BnGrad grad0 = grads[0], grad1 = grads[Inputs - 1];
  for_each_gradient<T, Inputs, mask>(
      inputs[0], inputs[Inputs - 1], grad_out, channels, rows,
      [&](int64_t r, int64_t c, auto used, auto group, const Vec<C>* g, const Vec<C>* x0, const Vec<C>* x1,
          const Channels<C>& of0, const Channels<C>& of1) FUSED_CNN_INLINE {
        for (int k = 0; k < decltype(group)::n; ++k) {
          const int64_t at = (r + k) * channels + c;
          store(input_gradient<C>(grad0, g[k], x0[k], of0, c, used), as<T>(grad0.grad_x) + at, used);
          if constexpr (Inputs == 2) {
            store(input_gradient<C>(grad1, g[k], x1[k], of1, c, used), as<T>(grad1.grad_x) + at, used);
          }
        }
      });
}

}  // namespace

void bn_moments(DType dtype, const void* x, int64_t stride, int64_t channels, int64_t rows, void* mean, void* m2) {
  FUSED_CNN_DISPATCH(dtype, T, {
    using C = compute_t<T>;
    moments(as<const T>(x), stride, channels, rows, as<C>(mean), as<C>(m2));
  })
}

void bn_apply(DType dtype, const BnInput* inputs, int count, const void* residual, int64_t residual_stride,
              bool use_relu, BnRows out, int64_t channels, int64_t rows) {
  FUSED_CNN_DISPATCH(dtype, T, {
    const auto call = residual     ? apply<T, 1, true, true>
                      : count == 2 ? apply<T, 2, false, true>
                      : use_relu   ? apply<T, 1, false, true>
                                   : apply<T, 1, false, false>;
    call(inputs, as<const T>(residual), residual_stride, out, channels, rows);
  })
}

void bn_reduce(DType dtype, const BnInput* inputs, int count, BnRows grad_out, bool use_relu, void* masked, BnSums sums,
               int64_t channels, int64_t rows) {
  FUSED_CNN_DISPATCH(dtype, T, {
    const auto call = grad_out.bits ? reduce<T, 1, Mask::bits>
                      : count == 2  ? reduce<T, 2, Mask::recompute>
                      : use_relu    ? reduce<T, 1, Mask::recompute>
                                    : reduce<T, 1, Mask::none>;
    call(inputs, grad_out, as<T>(masked), sums, channels, rows);
  })
}

void bn_grad_input(DType dtype, const BnInput* inputs, int count, BnRows grad_out, bool use_relu, const BnGrad* grads,
                   int64_t channels, int64_t rows) {
  FUSED_CNN_DISPATCH(dtype, T, {
    const auto call = count == 2 ? grad_input<T, 2, Mask::recompute>
                      : use_relu ? grad_input<T, 1, Mask::recompute>
                                 : grad_input<T, 1, Mask::none>;
    call(inputs, grad_out, grads, channels, rows);
  })
}

}  // namespace fused_cnn::FUSED_CNN_LEVEL
