// bn_moments reads x once from memory (each block twice, the second time from cache); bn_apply reads each input and
// writes the output; bn_reduce reads the gradient and each input and adds up two or three sums per channel;
// bn_grad_input reads them again and writes each input's gradient.
#include "batch_norm/cpu_kernels.h"
#include "batch_norm/bits.h"
#include "batch_norm/math.h"

namespace fused_cnn::FUSED_CNN_LEVEL {
namespace {

constexpr int64_t kStrip = 1024;           // channels whose sums fit the first-level cache are found together
constexpr int64_t kBlockElements = 16384;  // of the rows whose moments are: they fit the second-level one

// sum[c] += term(x[r][first + c]) over rows.
template <typename T, typename C, typename Term>
void add_rows(Rows x, int64_t first, int64_t channels, int64_t begin, int64_t end, C* sum, const Term& term) {
  row_groups(begin, end, channels * sizeof(T), [&](int64_t r, auto group) FUSED_CNN_LAMBDA {
    columns<C>(channels, [&](int64_t c, auto used) FUSED_CNN_LAMBDA {
      constexpr int n = decltype(group)::n;
      Vec<C> v[n];
      for (int k = 0; k < n; ++k) v[k] = term(load(x.at<const T>(r + k) + first + c, used), c, used);
      for (int k = 1; k < n; ++k) v[0] = v[0] + v[k];
      store(sum + c, load(sum + c, used) + v[0], used);
    });
  });
}

template <typename T, typename C = compute_t<T>>
void moments(Rows x, int64_t channels, int64_t begin, int64_t end, C* mean, C* m2) {
  C block_mean[kStrip], block_m2[kStrip];
  for (int64_t first = 0; first < channels; first += kStrip) {
    const int64_t width = min(channels - first, kStrip), block = kBlockElements / width;
    for (int64_t row = begin, next; row < end; row = next) {
      next = min(row + block, end);
      const int64_t n = next - row, done = row - begin;
      memset(block_mean, 0, width * sizeof(C));
      memset(block_m2, 0, width * sizeof(C));
      add_rows<T>(x, first, width, row, next, block_mean, [](Vec<C> v, int64_t, auto) FUSED_CNN_LAMBDA { return v; });
      for (int64_t c = 0; c < width; ++c) block_mean[c] /= C(n);
      add_rows<T>(x, first, width, row, next, block_m2, [&](Vec<C> v, int64_t c, auto used) FUSED_CNN_LAMBDA {
        const Vec<C> delta = v - load(block_mean + c, used);
        return delta * delta;
      });
      if (done == 0) {
        memcpy(mean + first, block_mean, width * sizeof(C));
        memcpy(m2 + first, block_m2, width * sizeof(C));
        continue;
      }
      const C share = C(n) / C(done + n), product = C(done) * share;
      for (int64_t c = 0; c < width; ++c)
        batch_norm::merge_moments(mean[first + c], m2[first + c], block_mean[c], block_m2[c], share, product);
    }
  }
}

// An input's vectors for one group of columns.
template <typename C>
struct Channels {
  Vec<C> mean, scale, bias;

  template <typename Used>
  FUSED_CNN_INLINE Channels(const BnInput& in, int64_t c, Used used)
      : mean(load(static_cast<const C*>(in.mean) + c, used)),
        scale(load(static_cast<const C*>(in.scale) + c, used)),
        bias(load(static_cast<const C*>(in.bias) + c, used)) {}
  FUSED_CNN_INLINE Vec<C> normalize(Vec<C> x) const { return batch_norm::normalize(x, mean, scale, bias); }
};

template <typename T, int Inputs, bool Residual, bool Relu>
void apply(BnForward args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const BnInput in0 = args.inputs[0], in1 = args.inputs[Inputs - 1];
  row_groups(begin, end, args.channels * sizeof(T), [&](int64_t r, auto group) FUSED_CNN_LAMBDA {
    columns<C>(args.channels, [&](int64_t c, auto used) FUSED_CNN_LAMBDA {
      const Channels<C> of0(in0, c, used), of1(in1, c, used);
      for (int64_t k = r; k < r + group.n; ++k) {
        Vec<C> v = of0.normalize(load(in0.x.at<const T>(k) + c, used));
        if constexpr (Inputs == 2) v = v + of1.normalize(load(in1.x.at<const T>(k) + c, used));
        if constexpr (Residual) v = v + load(args.residual.at<const T>(k) + c, used);
        if (Residual && args.bits) store_bits<C>(v, args.bits + k * mask_bytes(args.channels), c, used);
        store(args.out.at<T>(k) + c, Relu ? relu(v) : v, used);
      }
    });
  });
}

// How the gradient that ReLU lets through is known.
enum class Mask { none, bits, recompute };

// body(row, column, lanes used, how many rows, their g, their x of each input, the inputs' channels).
template <typename T, int Inputs, Mask mask, typename Body>
FUSED_CNN_INLINE void for_each_gradient(const BnBackward& args, Rows grad_out, int64_t begin, int64_t end,
                                        const Body& body) {
  using C = compute_t<T>;
  const BnInput in0 = args.inputs[0], in1 = args.inputs[Inputs - 1];
  row_groups(begin, end, args.channels * sizeof(T), [&](int64_t r, auto group) FUSED_CNN_LAMBDA {
    columns<C>(args.channels, [&](int64_t c, auto used) FUSED_CNN_LAMBDA {
      constexpr int n = decltype(group)::n;
      const Channels<C> of[] = {{in0, c, used}, {in1, c, used}};
      Vec<C> g[n], x[2][n];
      for (int k = 0; k < n; ++k) {
        g[k] = load(grad_out.at<const T>(r + k) + c, used);
        x[0][k] = load(in0.x.at<const T>(r + k) + c, used);
        if constexpr (Inputs == 2) x[1][k] = load(in1.x.at<const T>(r + k) + c, used);
        if constexpr (mask == Mask::bits)
          g[k] = apply_bits<C>(g[k], args.bits + (r + k) * mask_bytes(args.channels), c, used);
        if constexpr (mask == Mask::recompute) {
          Vec<C> out = of[0].normalize(x[0][k]);
          if constexpr (Inputs == 2) out = out + of[1].normalize(x[1][k]);
          g[k] = relu_grad(g[k], out);
        }
      }
      body(r, c, used, group, g, x, of);
    });
  });
}

template <typename T, int Inputs, Mask mask>
void reduce(BnBackward args, int64_t begin, int64_t end, compute_t<T>* sums) {
  using C = compute_t<T>;
  const auto body = [&](int64_t r, int64_t c, auto used, auto group, auto& g, auto& x, auto& of) FUSED_CNN_LAMBDA {
    Vec<C> total{}, total_x[2] = {};
    for (int k = 0; k < group.n; ++k) {
      if constexpr (mask == Mask::bits) store(args.masked.at<T>(r + k) + c, g[k], used);
      total = total + g[k];
      for (int i = 0; i < Inputs; ++i) total_x[i] = total_x[i] + g[k] * (x[i][k] - of[i].mean);
    }
    const auto add = [&](int64_t column, Vec<C> v)
                         FUSED_CNN_LAMBDA { store(sums + column + c, load(sums + column + c, used) + v, used); };
    add(args.sum, total);
    for (int i = 0; i < Inputs; ++i) add(args.sum_x[i], total_x[i]);
  };
  for_each_gradient<T, Inputs, mask>(args, args.grad_out, begin, end, body);
}

template <typename T, int Inputs, Mask mask>
void grad_input(BnBackward args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const auto body = [&](int64_t r, int64_t c, auto used, auto group, auto& g, auto& x, auto& of) FUSED_CNN_LAMBDA {
    for (int k = 0; k < group.n; ++k) {
      for (int i = 0; i < Inputs; ++i) {
        const BnGrad& to = args.grads[i];
        const C *offset = static_cast<const C*>(to.offset), *slope = static_cast<const C*>(to.slope);
        const Vec<C> grad = !offset ? g[k] * of[i].scale
                                    : batch_norm::grad_input(g[k], x[i][k], of[i].mean, of[i].scale,
                                                             load(offset + c, used), load(slope + c, used));
        store(to.grad_x.at<T>(r + k) + c, grad, used);
      }
    }
  };
  for_each_gradient<T, Inputs, mask>(args, args.bits ? args.masked : args.grad_out, begin, end, body);
}

}  // namespace

void bn_moments(DType dtype, Rows x, int64_t channels, int64_t begin, int64_t end, void* mean, void* m2) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    using C = compute_t<T>;
    moments<T>(x, channels, begin, end, static_cast<C*>(mean), static_cast<C*>(m2));
  });
}

void bn_apply(DType dtype, const BnForward& args, int64_t begin, int64_t end) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto call = args.residual.data ? apply<T, 1, true, true>
                      : args.count == 2  ? apply<T, 2, false, true>
                      : args.relu        ? apply<T, 1, false, true>
                                         : apply<T, 1, false, false>;
    call(args, begin, end);
  });
}

void bn_reduce(DType dtype, const BnBackward& args, int64_t begin, int64_t end, void* sums) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto call = args.bits         ? reduce<T, 1, Mask::bits>
                      : args.count == 2 ? reduce<T, 2, Mask::recompute>
                      : args.relu       ? reduce<T, 1, Mask::recompute>
                                        : reduce<T, 1, Mask::none>;
    call(args, begin, end, static_cast<compute_t<T>*>(sums));
  });
}

void bn_grad_input(DType dtype, const BnBackward& args, int64_t begin, int64_t end) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto call = args.count == 2           ? grad_input<T, 2, Mask::recompute>
                      : args.relu && !args.bits ? grad_input<T, 1, Mask::recompute>
                                                : grad_input<T, 1, Mask::none>;
    call(args, begin, end);
  });
}

}  // namespace fused_cnn::FUSED_CNN_LEVEL
