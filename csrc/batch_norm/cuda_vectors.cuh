// What the forward and the backward of batch_norm share on CUDA: the per-channel vectors of a thread's channels, and
// whether branches can be read 16 bytes at a time.
#pragma once
#include "batch_norm/ops.h"
#include "cuda/column_reduction.cuh"

namespace fused_cnn {

template <typename T>
struct BnVectors {
  using C = compute_t<T>;
  Vec8<C> mean, scale, bias;

  template <bool kAligned>
  __device__ static BnVectors load(const BnInput& in, const ThreadTile<BnBranch>& tile) {
    const auto channels_of = [&](const void* vector) {
      return load_vec8<kAligned>(static_cast<const C*>(vector) + tile.channel, tile.n);
    };
    BnVectors v{.mean = channels_of(in.mean), .scale = channels_of(in.rstd), .bias = channels_of(in.bias)};
    const Vec8<C> weight = channels_of(in.weight);
#pragma unroll
    for (int j = 0; j < kVec; ++j) v.scale.v[j] *= weight.v[j];
    return v;
  }
  __device__ C normalize(T x, int j) const {
    return batch_norm::normalize(to_compute(x), mean.v[j], scale.v[j], bias.v[j]);
  }
};

// Whether everything that the branches point to can move 16 bytes at a time.
template <typename T>
bool aligned16(const std::vector<BnBranch>& branches) {
  return std::all_of(branches.begin(), branches.end(), [](const BnBranch& b) {
    bool all = b.channels % kVec == 0 && aligned16(b.y, sizeof(T)) && aligned16(b.grad[0]) && aligned16(b.grad[1]);
    for (const BnInput& in : b.in) {
      all = all && aligned16(in.x, sizeof(T)) && aligned16(in.mean) && aligned16(in.rstd) && aligned16(in.weight) &&
            aligned16(in.bias);
    }
    return all;
  });
}

}  // namespace fused_cnn
