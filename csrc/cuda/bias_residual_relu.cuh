// out = relu(y + bias + residual) over rows, each branch into its slice: the concatenation's forward, and what follows
// the convolutions that cuDNN computes.
#pragma once
#include "cuda/column_reduction.cuh"
#include "shared/relu.h"

namespace fused_cnn {

// Grid (channel tiles, row chunks), 256 threads. Reads y and the residual once and writes out once: the copy's
// bandwidth is the limit. The 17 passes of ResNet-50's inference (batch 256, bfloat16) moved at 0.80 of it on an H200
// (2026-11-26).
template <typename T, typename B, bool kAligned>
__global__ void __launch_bounds__(kColumnThreads, kBlocksPerSm<T, kAligned>)
    bias_residual_relu_kernel(const __grid_constant__ BranchList<BiasResidualRelu> list, RowChunks chunks,
                              bool use_relu) {
  using C = compute_t<T>;
  constexpr int kRows = kInFlight<T, 1>;
  const ThreadTile tile(list, chunks);
  // With vectors a copy: through the pointer it would be read again for every row. Without them registers matter more.
  const BiasResidualRelu copy = *tile.branch, &branch = kAligned ? copy : *tile.branch;
  Vec8<B> bias{};
  if (branch.bias) bias = load_vec8<false>(static_cast<const B*>(branch.bias) + tile.channel, tile.n);
  Vec8<T> y[kRows], residual[kRows] = {};
  for_rows<kRows>(
      tile,
      [&](int u, int64_t row) {
        y[u] = load_vec8<kAligned>(branch.y.at<const T>(row) + tile.channel, tile.n);
        if (branch.residual.data) {
          residual[u] = load_vec8<kAligned>(branch.residual.at<const T>(row) + tile.channel, tile.n);
        }
      },
      [&](int u, int64_t row) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const C v = to_compute(y[u].v[j]) + to_compute(bias.v[j]) + to_compute(residual[u].v[j]);
          from_compute(use_relu ? relu(v) : v, &y[u].v[j]);
        }
        store_vec8<kAligned>(branch.out.at<T>(row) + tile.channel, y[u], tile.n);
      });
}

// Rows of branches of a tensor like x, whose biases are of the compute type (kWideBias) or of x's.
template <bool kWideBias = true>
void bias_residual_relu(const Tensor& x, const std::vector<BiasResidualRelu>& branches, bool relu, int64_t rows) {
  const int64_t size = x.element_size();
  const bool aligned = std::all_of(branches.begin(), branches.end(), [&](const BiasResidualRelu& b) {
    return b.channels % kVec == 0 && aligned16(b.y, size) && aligned16(b.residual, size) && aligned16(b.out, size);
  });
  with_type(dtype_of("bias_residual_relu", "x", x), [&](auto element) {
    using T = decltype(element);
    using B = std::conditional_t<kWideBias, compute_t<T>, T>;
    launch_columns(Launch(x), "bias_residual_relu_kernel",
                   aligned ? bias_residual_relu_kernel<T, B, true> : bias_residual_relu_kernel<T, B, false>, branches,
                   RowChunks::of(rows, branches), relu);
  });
}

}  // namespace fused_cnn
