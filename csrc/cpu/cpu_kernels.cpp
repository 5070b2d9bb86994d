// Reads and writes each element once; drelu_bgrad adds up columns on the way, as floats for a few rows at a time and
// then in double.
#include "cpu/cpu_kernels.h"
#include "cpu/simd.h"
#include "shared/relu.h"

namespace fused_cnn::FUSED_CNN_LEVEL {
namespace {

// Arguments come by value: the compiler then knows that no store changes them.
template <typename T, bool Bias, bool Residual, bool Relu>
void forward(BiasResidualRelu args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  row_groups(begin, end, args.channels * sizeof(T), [&](int64_t r, auto group) FUSED_CNN_LAMBDA {
    columns<C>(args.channels, [&](int64_t c, auto used) FUSED_CNN_LAMBDA {
      Vec<C> bias{};
      if constexpr (Bias) bias = load(static_cast<const C*>(args.bias) + c, used);
      for (int64_t k = r; k < r + group.n; ++k) {
        Vec<C> v = load(args.y.at<const T>(k) + c, used);
        if constexpr (Bias) v = v + bias;
        if constexpr (Residual) v = v + load(args.residual.at<const T>(k) + c, used);
        store(args.out.at<T>(k) + c, Relu ? relu(v) : v, used);
      }
    });
  });
}

constexpr int64_t kStrip = 1024;     // channels whose sums lie in the first-level cache
constexpr int64_t kRowsPerSum = 64;  // added up as floats, at least

template <typename T, bool Relu, bool Sum, bool Write>
void backward(Rows grad_out, Rows out, DreluBranch branch, int64_t begin, int64_t end, double* sums) {
  using C = compute_t<T>;
  const Rows grad{branch.grad, branch.channels};
  const int64_t blocks = Sum ? max((end - begin) / kRowsPerSum, 1) : 1;
  C partial[kStrip];
  for (int64_t first = 0; first < branch.channels; first += kStrip) {
    const int64_t width = min(kStrip, branch.channels - first), of_all = branch.first + first;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t from = begin + (end - begin) * block / blocks, to = begin + (end - begin) * (block + 1) / blocks;
      if constexpr (Sum) memset(partial, 0, width * sizeof(C));
      row_groups(from, to, width * sizeof(T), [&](int64_t r, auto group) FUSED_CNN_LAMBDA {
        columns<C>(width, [&](int64_t c, auto used) FUSED_CNN_LAMBDA {
          Vec<C> total{};
          for (int64_t k = r; k < r + group.n; ++k) {
            Vec<C> g = load(grad_out.at<const T>(k) + of_all + c, used);
            if constexpr (Relu) g = relu_grad(g, load(out.at<const T>(k) + of_all + c, used));
            if constexpr (Write) store(grad.at<T>(k) + first + c, g, used);
            if constexpr (Sum) total = total + g;
          }
          if constexpr (Sum) store(partial + c, load(partial + c, used) + total, used);
        });
      });
      if constexpr (Sum) {
        for (int64_t c = 0; c < width; ++c) sums[of_all + c] += partial[c];
      }
    }
  }
}

}  // namespace

void bias_residual_relu(DType dtype, const BiasResidualRelu& args, bool relu, int64_t begin, int64_t end) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto call = args.residual.data ? (relu ? forward<T, false, true, true> : forward<T, false, true, false>)
                      : args.bias        ? (relu ? forward<T, true, false, true> : forward<T, true, false, false>)
                                         : (relu ? forward<T, false, false, true> : forward<T, false, false, false>);
    call(args, begin, end);
  });
}

void drelu_bgrad(DType dtype, const Rows& grad_out, const Rows& out, const DreluBranch& branch, int64_t begin,
                 int64_t end, double* sums) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto call = !branch.grad ? backward<T, false, true, false>
                      : out.data   ? (sums ? backward<T, true, true, true> : backward<T, true, false, true>)
                                   : (sums ? backward<T, false, true, true> : backward<T, false, false, true>);
    call(grad_out, out, branch, begin, end, sums);
  });
}

}  // namespace fused_cnn::FUSED_CNN_LEVEL
