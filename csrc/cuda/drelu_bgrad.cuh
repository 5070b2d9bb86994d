// Gradients under ReLU's mask over rows, each branch from its channels of grad_out, and on the way their sums per
// channel, which are the bias's gradient.
#pragma once
#include <optional>
#include "cuda/column_reduction.cuh"
#include "shared/relu.h"

namespace fused_cnn {

// Where a branch's gradient goes (null: nowhere, the sums alone are wanted), and where its channels begin.
template <typename T>
struct DreluBranch {
  T* grad;
  int64_t channels, first;
};

// `out` null: there was no ReLU. partial[chunk] = the sums for all `total` channels, unless null.
// Grid (channel tiles, row chunks), 256 threads. Reads grad_out and out once and writes grad once: the copy's bandwidth
// is the limit. With the reduction of the chunks behind it, GoogLeNet 3a's concatenation (batch 256, bfloat16) reached
// 0.72 of it on an H200 (2026-11-26).
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kColumnThreads, kBlocksPerSm<T, kAligned>)
    drelu_bgrad_kernel(const __grid_constant__ BranchList<DreluBranch<T>> list, RowChunks chunks,
                       const T* __restrict__ grad_out, int64_t grad_pitch, const T* __restrict__ out, int64_t out_pitch,
                       compute_t<T>* __restrict__ partial, int64_t total) {
  using C = compute_t<T>;
  constexpr int kRows = kInFlight<T, 2>;
  const ThreadTile tile(list, chunks);
  const DreluBranch<T>& branch = *tile.branch;
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
        if (branch.grad) store_vec8<kAligned>(branch.grad + row * branch.channels + tile.channel, g[u], tile.n);
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

// `out` is RowView{} where there was no ReLU; grad_bias, of type Out, is null where it is not wanted.
template <typename T, typename Out>
void drelu_bgrad(const Launch& launch, const RowView& grad_out, const RowView& out,
                 const std::vector<DreluBranch<T>>& branches, Out* grad_bias, int64_t rows) {
  using C = compute_t<T>;
  const T *grad = static_cast<const T*>(grad_out.data), *result = static_cast<const T*>(out.data);
  bool aligned = rows_aligned16(grad, grad_out.stride) && rows_aligned16(result, out.stride);
  int64_t total = 0;
  for (const DreluBranch<T>& b : branches) {
    total += b.channels;
    aligned = aligned && b.channels % kVec == 0 && b.first % kVec == 0 && aligned16(b.grad);
  }
  const RowChunks chunks = RowChunks::of(rows, branches);
  Tensor partial;
  if (grad_bias) {
    partial = empty_vector(grad_out.tensor, chunks.count * total,
                           std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float);
  }
  C* sums = grad_bias ? data_of<C>(partial) : nullptr;
  launch_columns(launch, "drelu_bgrad_kernel", aligned ? drelu_bgrad_kernel<T, true> : drelu_bgrad_kernel<T, false>,
                 branches, chunks, grad, grad_out.stride, result, out.stride, sums, total);
  if (grad_bias) {
    launch_reduce(launch, "reduce_chunks_kernel", reduce_chunks_kernel<C, Out>, total, sums, chunks.count, total,
                  grad_bias);
  }
}

// A convolution's grad_out under the mask of `out`, where there is one, as rows; `own` holds them where they are new.
// `bias` is their sum in grad_out's type, or empty.
struct MaskedGradient {
  RowView rows;
  std::optional<RowResult> own;
  Tensor bias;

  MaskedGradient(const Launch& launch, const Tensor& grad_out, const std::optional<Tensor>& out, bool needs_bias)
      : rows(rows_of(grad_out)), bias(nothing(grad_out)) {
    const int64_t channels = grad_out.size(1);
    if (!out && !needs_bias) return;
    if (needs_bias) bias = empty_vector(grad_out, channels, grad_out.scalar_type());
    if (out) own.emplace(grad_out, channels, result_format(*out));
    const RowView result = out ? rows_of(*out) : RowView{};
    with_type(dtype_of("masked gradient", "grad_out", grad_out), [&](auto element) {
      using T = decltype(element);
      const std::vector<DreluBranch<T>> branch{
          {.grad = own ? static_cast<T*>(own->data) : nullptr, .channels = channels, .first = 0}};
      drelu_bgrad(launch, rows, result, branch, needs_bias ? data_of<T>(bias) : nullptr, row_count(grad_out));
    });
    if (own) rows = {.tensor = own->tensor, .data = own->data, .stride = channels};
  }
  Tensor residual(const Tensor& grad_out) const { return own ? own->finish() : nothing(grad_out); }
};

}  // namespace fused_cnn
