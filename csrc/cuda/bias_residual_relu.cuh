// out = relu(y + bias + residual) over rows, each branch into its place: the concatenation's forward, and the epilogue
// of convolutions that are the library's. Reads and writes each element once.
#pragma once
#include "cuda/column_reduction.cuh"
#include "shared/relu.h"

namespace fused_cnn {

// Bias (of type B, one a channel) and residual are null where there is none. Data points to the branch's first channel.
template <typename T, typename B>
struct FinishBranch {
  const T* y;
  int64_t y_pitch;
  const B* bias;
  const T* residual;
  int64_t residual_pitch;
  T* out;
  int64_t out_pitch, channels;
};

template <typename T, typename B, bool kVectors>
__global__ void __launch_bounds__(kColumnThreads, kBlocks<T, kVectors>)
    finish_rows_kernel(const __grid_constant__ BranchList<FinishBranch<T, B>> list, bool use_relu, Chunks chunks) {
  using C = compute_t<T>;
  constexpr int kRows = kInFlight<T, 1>;
  const BranchPlace place(list, chunks);
  const FinishBranch<T, B>& branch = place.branch;
  Octet<B> bias{};
  if (branch.bias) bias = load_octet<false>(branch.bias + place.channel, place.n);
  Octet<T> y[kRows], residual[kRows] = {};
  for_rows<kRows>(
      place,
      [&](int u, int64_t row) {
        y[u] = load_octet<kVectors>(branch.y + row * branch.y_pitch + place.channel, place.n);
        if (branch.residual) {
          residual[u] = load_octet<kVectors>(branch.residual + row * branch.residual_pitch + place.channel, place.n);
        }
      },
      [&](int u, int64_t row) {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          const C v = to_compute(y[u].v[j]) + to_compute(bias.v[j]) + to_compute(residual[u].v[j]);
          from_compute(use_relu ? relu(v) : v, &y[u].v[j]);
        }
        store_octet<kVectors>(branch.out + row * branch.out_pitch + place.channel, y[u], place.n);
      });
}

template <typename T, typename B>
void finish_rows(const Launch& launch, const std::vector<FinishBranch<T, B>>& branches, bool relu, int64_t rows) {
  const bool vectors = std::all_of(branches.begin(), branches.end(), [](const FinishBranch<T, B>& b) {
    return b.channels % kOctet == 0 && on_vectors(b.y, b.y_pitch, sizeof(T)) &&
           on_vectors(b.residual, b.residual_pitch, sizeof(T)) && on_vectors(b.out, b.out_pitch, sizeof(T));
  });
  const auto kernel = vectors ? finish_rows_kernel<T, B, true> : finish_rows_kernel<T, B, false>;
  const Chunks chunks = Chunks::of(rows, branches);
  in_lists(branches, [&](const BranchList<FinishBranch<T, B>>& list, int64_t strips) {
    launch.run("finish_rows_kernel", kernel, strips, chunks.count, kColumnThreads, list, relu, chunks);
  });
}

}  // namespace fused_cnn
