// What the forward and the backward of batch_norm share on CUDA: a branch as the kernels see it, and the per-channel
// vectors of a thread's channels.
#pragma once
#include "batch_norm/checks.h"
#include "batch_norm/math.h"
#include "cuda/column_reduction.cuh"

namespace fused_cnn {

enum class Residual { none, plain, normalized };

// Rows of x and, at x's first channel, its statistics and parameters.
template <typename T>
struct BnInput {
  const T* x;
  int64_t pitch;
  const compute_t<T>*mean, *rstd, *weight, *bias;
};

template <typename T>
struct BnBranch {
  int64_t channels, first;  // first: its place among the channels of all branches
  BnInput<T> in[2];         // x; the residual, of which a plain one has rows only
  T* y;                     // forward: its slice of the result; backward: of grad_out
  int64_t y_pitch;
  T* grad[2];  // backward: the gradients of x and of the residual, rows of `channels`
  bool training[2];
  double eps;
};

template <typename T>
struct BnVectors {
  Vec8<compute_t<T>> mean, scale, bias;

  template <bool kAligned>
  __device__ static BnVectors load(const BnInput<T>& in, const ThreadTile<BnBranch<T>>& tile) {
    BnVectors v;
    v.mean = load_vec8<kAligned>(in.mean + tile.channel, tile.n);
    v.scale = load_vec8<kAligned>(in.rstd + tile.channel, tile.n);
    v.bias = load_vec8<kAligned>(in.bias + tile.channel, tile.n);
    const auto weight = load_vec8<kAligned>(in.weight + tile.channel, tile.n);
#pragma unroll
    for (int j = 0; j < kVec; ++j) v.scale.v[j] *= weight.v[j];
    return v;
  }
  __device__ compute_t<T> normalize(T x, int j) const {
    return batch_norm::normalize(to_compute(x), mean.v[j], scale.v[j], bias.v[j]);
  }
};

// The checked inputs on their device and stream.
struct BnInputs : NormalizedInputs {
  using NormalizedInputs::NormalizedInputs;
  Launch launch{mean};

  template <typename T>
  BnInput<T> input(size_t i) const {
    using C = compute_t<T>;
    return {.x = static_cast<const T*>(views[i].data),
            .pitch = views[i].stride,
            .mean = data_of<C>(mean) + first[i],
            .rstd = data_of<C>(rstd) + first[i],
            .weight = data_of<C>(weights[i]),
            .bias = data_of<C>(biases[i])};
  }

  // Every input as a branch, beside its channels of the rows at y.
  template <typename T>
  std::vector<BnBranch<T>> branches(void* y, int64_t y_pitch) const {
    std::vector<BnBranch<T>> found;
    for (size_t i = 0; i < views.size(); ++i) {
      found.push_back({.channels = views[i].tensor.size(1),
                       .first = first[i],
                       .in = {input<T>(i)},
                       .y = static_cast<T*>(y) + first[i],
                       .y_pitch = y_pitch});
    }
    return found;
  }
};

// Whether everything that the branches point to can move 16 bytes at a time.
template <typename T>
bool aligned16(const std::vector<BnBranch<T>>& branches) {
  return std::all_of(branches.begin(), branches.end(), [](const BnBranch<T>& b) {
    bool all = b.channels % kVec == 0 && rows_aligned16(b.y, b.y_pitch);
    for (const BnInput<T>& in : b.in) {
      all = all && rows_aligned16(in.x, in.pitch) && aligned16(in.mean) && aligned16(in.rstd) && aligned16(in.weight) &&
            aligned16(in.bias);
    }
    return all && aligned16(b.grad[0]) && aligned16(b.grad[1]);
  });
}

}  // namespace fused_cnn
