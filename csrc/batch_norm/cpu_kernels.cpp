// bn_moments reads x once from memory (each block twice, the second time from cache); bn_apply reads each input and
// writes the output; bn_reduce reads the gradient and each input and adds up two or three sums per channel;
// bn_grad_input reads them again and writes each input's gradient.
#include "batch_norm/cpu_kernels.h"
#include "batch_norm/math.h"
#include "cpu/simd.h"

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

// ReLU's mask of vector v, which begins at column c of the row.
template <typename C, typename Used>
FUSED_CNN_INLINE void store_bits(Vec<C> v, uint8_t* row, int64_t c, Used used) {
#if defined(__AVX512F__)
  uint32_t bits;
  if constexpr (sizeof(C) == 4) bits = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ);
  if constexpr (sizeof(C) == 8) bits = _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_NLE_UQ);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<C>; ++i) bits |= static_cast<uint32_t>(!(v[i] <= C(0))) << i;
#endif
  uint8_t* byte = row + c / 8;
  if (c % 8 == 0) {
    byte[0] = static_cast<uint8_t>(bits);
  } else {  // vectors of fewer than 8 lanes
    byte[0] |= static_cast<uint8_t>(bits << (c % 8));
  }
  if (min(used.n, kLanes<C>) > 8) byte[1] = static_cast<uint8_t>(bits >> 8);
}

// v where the bit is set, else 0.
template <typename C, typename Used>
FUSED_CNN_INLINE Vec<C> apply_bits(Vec<C> v, const uint8_t* row, int64_t c, Used used) {
  const uint8_t* byte = row + c / 8;
  const uint32_t bits = (byte[0] | (min(used.n, kLanes<C>) > 8 ? uint32_t{byte[1]} << 8 : 0u)) >> (c % 8);
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v);
  if constexpr (sizeof(C) == 8) return _mm512_maskz_mov_pd(static_cast<__mmask8>(bits), v);
#else
  using Int = decltype(v <= v);
  Int lane_bit;
  for (int i = 0; i < kLanes<C>; ++i) lane_bit[i] = 1 << i;
  return ((Int{} + static_cast<int>(bits)) & lane_bit) != 0 ? v : Vec<C>{};
#endif
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

constexpr int inputs_of(Residual residual) {
  return residual == Residual::normalized ? 2 : 1;
}

// Arguments come by value: the compiler then knows that no store changes them.
template <typename T, Residual kResidual, bool kRelu>
void apply(BnBranch branch, uint8_t* mask, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const BnInput in0 = branch.in[0], in1 = branch.in[inputs_of(kResidual) - 1];
  const Rows added = branch.in[1].x;
  row_groups(begin, end, branch.channels * sizeof(T), [&](int64_t r, auto group) FUSED_CNN_LAMBDA {
    columns<C>(branch.channels, [&](int64_t c, auto used) FUSED_CNN_LAMBDA {
      const Channels<C> of0(in0, c, used), of1(in1, c, used);
      for (int64_t k = r; k < r + group.n; ++k) {
        Vec<C> v = of0.normalize(load(in0.x.at<const T>(k) + c, used));
        if constexpr (kResidual == Residual::normalized) v = v + of1.normalize(load(added.at<const T>(k) + c, used));
        if constexpr (kResidual == Residual::plain) {
          v = v + load(added.at<const T>(k) + c, used);
          if (mask) store_bits<C>(v, mask + k * mask_bytes(branch.channels), c, used);
        }
        store(branch.y.at<T>(k) + c, kRelu ? relu(v) : v, used);
      }
    });
  });
}

// body(row, column, lanes used, how many rows, their g, their x of each input, the inputs' channels).
template <typename T, Residual kResidual, bool kRelu, typename Body>
FUSED_CNN_INLINE void for_each_gradient(const BnBranch& branch, const uint8_t* mask, int64_t begin, int64_t end,
                                        const Body& body) {
  using C = compute_t<T>;
  const BnInput in0 = branch.in[0], in1 = branch.in[inputs_of(kResidual) - 1];
  row_groups(begin, end, branch.channels * sizeof(T), [&](int64_t r, auto group) FUSED_CNN_LAMBDA {
    columns<C>(branch.channels, [&](int64_t c, auto used) FUSED_CNN_LAMBDA {
      constexpr int n = decltype(group)::n;
      const Channels<C> of[] = {{in0, c, used}, {in1, c, used}};
      Vec<C> g[n], x[2][n];
      for (int k = 0; k < n; ++k) {
        g[k] = load(branch.y.at<const T>(r + k) + c, used);
        x[0][k] = load(in0.x.at<const T>(r + k) + c, used);
        if constexpr (kResidual == Residual::normalized) x[1][k] = load(in1.x.at<const T>(r + k) + c, used);
        if constexpr (kResidual == Residual::plain) {
          g[k] = apply_bits<C>(g[k], mask + (r + k) * mask_bytes(branch.channels), c, used);
        } else if constexpr (kRelu) {
          Vec<C> out = of[0].normalize(x[0][k]);
          if constexpr (kResidual == Residual::normalized) out = out + of[1].normalize(x[1][k]);
          g[k] = relu_grad(g[k], out);
        }
      }
      body(r, c, used, group, g, x, of);
    });
  });
}

template <typename T, Residual kResidual, bool kRelu>
void reduce(BnBranch branch, const uint8_t* mask, int64_t total, int64_t begin, int64_t end, compute_t<T>* sums) {
  using C = compute_t<T>;
  const Rows masked{branch.grad[1], branch.channels};
  const auto body = [&](int64_t r, int64_t c, auto used, auto group, auto& g, auto& x, auto& of) FUSED_CNN_LAMBDA {
    constexpr int kInputs = inputs_of(kResidual);
    Vec<C> sum{}, sum_x[kInputs] = {};
    for (int k = 0; k < group.n; ++k) {
      if constexpr (kResidual == Residual::plain) store(masked.at<T>(r + k) + c, g[k], used);
      sum = sum + g[k];
      for (int i = 0; i < kInputs; ++i) sum_x[i] = sum_x[i] + g[k] * (x[i][k] - of[i].mean);
    }
    const auto add = [&](int64_t column, Vec<C> v)
                         FUSED_CNN_LAMBDA { store(sums + column + c, load(sums + column + c, used) + v, used); };
    add(branch.first, sum);
    for (int i = 0; i < kInputs; ++i) add((i + 1) * total + branch.first, sum_x[i]);
  };
  for_each_gradient<T, kResidual, kRelu>(branch, mask, begin, end, body);
}

template <typename T, Residual kResidual, bool kRelu>
void grad_input(BnBranch branch, const compute_t<T>* offset, const compute_t<T>* slope, int64_t total, int64_t begin,
                int64_t end) {
  using C = compute_t<T>;
  const auto body = [&](int64_t r, int64_t c, auto used, auto group, auto& g, auto& x, auto& of) FUSED_CNN_LAMBDA {
    for (int k = 0; k < group.n; ++k) {
      for (int i = 0; i < inputs_of(kResidual); ++i) {
        const int64_t at = i * total + branch.first + c;
        const Vec<C> grad = !branch.training[i]
                                ? g[k] * of[i].scale
                                : batch_norm::grad_input(g[k], x[i][k], of[i].mean, of[i].scale,
                                                         load(offset + at, used), load(slope + at, used));
        store(Rows{branch.grad[i], branch.channels}.at<T>(r + k) + c, grad, used);
      }
    }
  };
  for_each_gradient<T, kResidual, kRelu>(branch, nullptr, begin, end, body);
}

}  // namespace

void bn_moments(DType dtype, Rows x, int64_t channels, int64_t begin, int64_t end, void* mean, void* m2) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    using C = compute_t<T>;
    moments<T>(x, channels, begin, end, static_cast<C*>(mean), static_cast<C*>(m2));
  });
}

void bn_apply(DType dtype, const BnBranch& branch, Residual residual, bool relu, uint8_t* mask, int64_t begin,
              int64_t end) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto call = residual == Residual::plain        ? apply<T, Residual::plain, true>
                      : residual == Residual::normalized ? apply<T, Residual::normalized, true>
                      : relu                             ? apply<T, Residual::none, true>
                                                         : apply<T, Residual::none, false>;
    call(branch, mask, begin, end);
  });
}

void bn_reduce(DType dtype, const BnBranch& branch, Residual residual, bool relu, const uint8_t* mask, int64_t total,
               int64_t begin, int64_t end, void* sums) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto call = residual == Residual::plain        ? reduce<T, Residual::plain, true>
                      : residual == Residual::normalized ? reduce<T, Residual::normalized, true>
                      : relu                             ? reduce<T, Residual::none, true>
                                                         : reduce<T, Residual::none, false>;
    call(branch, mask, total, begin, end, static_cast<compute_t<T>*>(sums));
  });
}

void bn_grad_input(DType dtype, const BnBranch& branch, Residual residual, bool relu, const void* offset,
                   const void* slope, int64_t total, int64_t begin, int64_t end) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    using C = compute_t<T>;
    const auto call = residual == Residual::normalized ? grad_input<T, Residual::normalized, true>
                      : relu                           ? grad_input<T, Residual::none, true>
                                                       : grad_input<T, Residual::none, false>;
    call(branch, static_cast<const C*>(offset), static_cast<const C*>(slope), total, begin, end);
  });
}

}  // namespace fused_cnn::FUSED_CNN_LEVEL
