// Gradients under ReLU's mask over rows, each branch from its channels of grad_out, and on the way their sums per
// channel, which are the bias's gradient.
#pragma once
#include "cuda/column_reduction.cuh"
#include "shared/relu.h"

namespace fused_cnn {

// `out` null: there was no ReLU. partial[chunk] = the sums for all `total` channels, unless null.
// Grid (channel tiles, row chunks), 256 threads. Reads grad_out and out once and writes grad once: the copy's bandwidth
// is the limit. With the reduction of the chunks behind it, GoogLeNet 3a's concatenation (batch 256, bfloat16) reached
// 0.72 of it on an H200 (2026-11-26).
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kColumnThreads, kBlocksPerSm<T, kAligned>)
    drelu_bgrad_kernel(const __grid_constant__ BranchList<DreluBranch> list, RowChunks chunks,
                       const T* __restrict__ grad_out, int64_t grad_pitch, const T* __restrict__ out, int64_t out_pitch,
                       compute_t<T>* __restrict__ partial, int64_t total) {
  using C = compute_t<T>;
  constexpr int kRows = kInFlight<T, 2>;
  const ThreadTile tile(list, chunks);
  const DreluBranch& branch = *tile.branch;
  const int64_t from = branch.first + tile.channel;
  C sums[kVec] = {};
  Vec8<T> g[kRows], o[kRows];
  for_rows<kRows>(
      tile,
      [&](int u, int64_t row) {
        g[u] = load_vec8<kAligned>(grad_out + row * grad_pitch + from, tile.n);
        if (out) o[u] = load_vec8<kAligned>(out + row * out_pitch + from, tile.n);
      },
      [&](int u, int64_t row) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          C v = to_compute(g[u].v[j]);
          if (out) v = relu_grad(v, static_cast<C>(to_compute(o[u].v[j])));
          sums[j] += v;
          from_compute(v, &g[u].v[j]);
        }
        if (branch.grad) {
          store_vec8<kAligned>(static_cast<T*>(branch.grad) + row * branch.channels + tile.channel, g[u], tile.n);
        }
      });
  if (!partial) return;
  block_reduce_columns(sums, tile,
                       [&](int64_t channel, C sum) { partial[blockIdx.y * total + branch.first + channel] = sum; });
}

// Grid (channels / 32), 512 threads. Reads the chunks' sums, a few bytes for each thousand of the pass before it.
template <typename C, typename Out>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_chunks_kernel(const C* __restrict__ partial, int64_t chunks, int64_t channels, Out* __restrict__ out) {
  const int64_t channel = reduce_channel();
  const bool inside = channel < channels;
  const double sum = reduce_chunks(chunks, inside, [&](int64_t i) { return partial[i * channels + channel]; });
  if (threadIdx.x < 32 && inside) from_compute(static_cast<C>(sum), &out[channel]);
}

// `from` and `out` are rows of grad_out, or what was made of it, and of the result, null where there was no ReLU.
// Returns the sums of all channels, in grad_out's type or the compute type; none where they are not wanted.
inline Tensor drelu_bgrad(const Tensor& grad_out, const Rows& from, const Rows& out,
                          const std::vector<DreluBranch>& branches, int64_t rows, bool wants_sums,
                          ScalarType sums_type) {
  const int64_t size = grad_out.element_size();
  bool aligned = aligned16(from, size) && aligned16(out, size);
  int64_t total = 0;
  for (const DreluBranch& b : branches) {
    total += b.channels;
    aligned = aligned && b.channels % kVec == 0 && b.first % kVec == 0 && aligned16(b.grad);
  }
  const Launch launch(grad_out);
  const RowChunks chunks = RowChunks::of(rows, branches);
  const DType dtype = dtype_of("drelu_bgrad", "grad_out", grad_out);
  const int64_t columns = wants_sums ? total : 0;
  const Tensor partial = wants_sums ? empty_vector(grad_out, chunks.count * total, vector_dtype(dtype)) : Tensor();
  const Tensor sums = empty_vector(grad_out, columns, sums_type);
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    using C = compute_t<T>;
    C* const of_chunks = wants_sums ? data_of<C>(partial) : nullptr;
    launch_columns(launch, "drelu_bgrad_kernel", aligned ? drelu_bgrad_kernel<T, true> : drelu_bgrad_kernel<T, false>,
                   branches, chunks, from.at<const T>(0), from.pitch, out.at<const T>(0), out.pitch, of_chunks, total);
    const auto reduce = [&](auto sum) {
      using Out = decltype(sum);
      launch_reduce(launch, "reduce_chunks_kernel", reduce_chunks_kernel<C, Out>, columns, of_chunks, chunks.count,
                    total, data_of<Out>(sums));
    };
    sums_type == grad_out.scalar_type() ? reduce(T{}) : reduce(C{});
  });
  return sums;
}

}  // namespace fused_cnn
