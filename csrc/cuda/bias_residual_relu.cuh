// out = relu(y + bias + residual) over rows, each branch into its slice: the concatenation's forward, and what follows
// the convolutions that cuDNN computes.
#pragma once
#include "cuda/column_reduction.cuh"
#include "shared/relu.h"

namespace fused_cnn {

// Bias (of type B, one a channel) and residual are null where there is none. Data points to the branch's first channel.
template <typename T, typename B>
struct EpilogueBranch {
  const T* y;
  int64_t y_pitch;
  const B* bias;
  const T* residual;
  int64_t residual_pitch;
  T* out;
  int64_t out_pitch, channels;
};

// Grid (channel tiles, row chunks), 256 threads. Reads y and the residual once and writes out once: the copy's
// bandwidth is the limit. The 17 passes of ResNet-50's inference (batch 256, bfloat16) moved at 0.80 of it on an H200
// (2026-11-26).
template <typename T, typename B, bool kAligned>
__global__ void __launch_bounds__(kColumnThreads, kBlocksPerSm<T, kAligned>)
    bias_residual_relu_kernel(const __grid_constant__ BranchList<EpilogueBranch<T, B>> list, RowChunks chunks,
                              bool use_relu) {
  using C = compute_t<T>;
  constexpr int kRows = kInFlight<T, 1>;
  const ThreadTile tile(list, chunks);
  const EpilogueBranch<T, B>& branch = *tile.branch;
  Vec8<B> bias{};
  if (branch.bias) bias = load_vec8<false>(branch.bias + tile.channel, tile.n);
  Vec8<T> y[kRows], residual[kRows] = {};
  for_rows<kRows>(
      tile,
      [&](int u, int64_t row) {
        y[u] = load_vec8<kAligned>(branch.y + row * branch.y_pitch + tile.channel, tile.n);
        if (branch.residual) {
          residual[u] = load_vec8<kAligned>(branch.residual + row * branch.residual_pitch + tile.channel, tile.n);
        }
      },
      [&](int u, int64_t row) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const C v = to_compute(y[u].v[j]) + to_compute(bias.v[j]) + to_compute(residual[u].v[j]);
          from_compute(use_relu ? relu(v) : v, &y[u].v[j]);
        }
        store_vec8<kAligned>(branch.out + row * branch.out_pitch + tile.channel, y[u], tile.n);
      });
}

template <typename T, typename B>
void bias_residual_relu(const Launch& launch, const std::vector<EpilogueBranch<T, B>>& branches, bool relu,
                        int64_t rows) {
  const bool aligned = std::all_of(branches.begin(), branches.end(), [](const EpilogueBranch<T, B>& b) {
    return b.channels % kVec == 0 && rows_aligned16(b.y, b.y_pitch) && rows_aligned16(b.residual, b.residual_pitch) &&
           rows_aligned16(b.out, b.out_pitch);
  });
  launch_columns(launch, "bias_residual_relu_kernel",
                 aligned ? bias_residual_relu_kernel<T, B, true> : bias_residual_relu_kernel<T, B, false>, branches,
                 RowChunks::of(rows, branches), relu);
}

}  // namespace fused_cnn
