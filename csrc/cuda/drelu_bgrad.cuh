// Gradients under ReLU's mask over rows, each branch from its channels of grad_out, and their sums per channel, the
// bias's gradient, on the way. Reads grad_out and the result once, writes the gradient once.
#pragma once
#include <optional>
#include "cuda/column_reduction.cuh"
#include "shared/relu.h"

namespace fused_cnn {

// Where a branch's gradient goes (null: nowhere, the sums alone are wanted), and where its channels begin.
template <typename T>
struct MaskBranch {
  T* grad;
  int64_t channels, first;
};

// `out` null: there was no ReLU. partial[chunk] = the sums for all `total` channels, unless null.
template <typename T, bool kVectors>
__global__ void __launch_bounds__(kColumnThreads, kBlocks<T, kVectors>)
    mask_rows_kernel(const __grid_constant__ BranchList<MaskBranch<T>> list, const T* __restrict__ grad_out,
                     int64_t grad_pitch, const T* __restrict__ out, int64_t out_pitch, Chunks chunks,
                     compute_t<T>* __restrict__ partial, int64_t total) {
  using C = compute_t<T>;
  constexpr int kRows = kInFlight<T, 2>;
  const BranchPlace place(list, chunks);
  const MaskBranch<T>& branch = place.branch;
  const int64_t from = branch.first + place.channel;
  C sums[kOctet] = {};
  Octet<T> g[kRows], o[kRows];
  for_rows<kRows>(
      place,
      [&](int u, int64_t row) {
        g[u] = load_octet<kVectors>(grad_out + row * grad_pitch + from, place.n);
        if (out) o[u] = load_octet<kVectors>(out + row * out_pitch + from, place.n);
      },
      [&](int u, int64_t row) {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          C v = to_compute(g[u].v[j]);
          if (out) v = relu_grad(v, static_cast<C>(to_compute(o[u].v[j])));
          sums[j] += v;
          from_compute(v, &g[u].v[j]);
        }
        if (branch.grad) store_octet<kVectors>(branch.grad + row * branch.channels + place.channel, g[u], place.n);
      });
  if (!partial) return;
  add_up_block(sums, place,
               [&](int64_t channel, C sum) { partial[blockIdx.y * total + branch.first + channel] = sum; });
}

template <typename C, typename Out>
__global__ void __launch_bounds__(kChunkThreads)
    add_up_chunks_kernel(const C* __restrict__ partial, int64_t chunks, int64_t channels, Out* __restrict__ out) {
  const ChunkPlace place(chunks);
  double sum = 0;
  if (place.channel < channels) {
#pragma unroll 4
    for (int64_t i = place.chunk; i < place.end; ++i) sum += partial[i * channels + place.channel];
  }
  sum = add_up_parts(sum);
  if (place.first && place.channel < channels) from_compute(static_cast<C>(sum), &out[place.channel]);
}

// grad_bias, of type Out, is null where it is not wanted.
template <typename T, typename Out>
void mask_rows(const Launch& launch, const RowView& grad, const RowView* out,
               const std::vector<MaskBranch<T>>& branches, int64_t total, Out* grad_bias, int64_t rows) {
  using C = compute_t<T>;
  bool vectors =
      on_vectors(grad.data, grad.stride, sizeof(T)) && (!out || on_vectors(out->data, out->stride, sizeof(T)));
  for (const MaskBranch<T>& b : branches) {
    vectors = vectors && b.channels % kOctet == 0 && b.first % kOctet == 0 && aligned16(b.grad);
  }
  const auto kernel = vectors ? mask_rows_kernel<T, true> : mask_rows_kernel<T, false>;
  const Chunks chunks = Chunks::of(rows, branches);
  Tensor partial;
  C* sums = nullptr;
  if (grad_bias) {
    partial = empty_vector(grad.tensor, chunks.count * total, vector_dtype(dtype_of("mask_rows", "grad", grad.tensor)));
    sums = static_cast<C*>(partial.data_ptr());
  }
  in_lists(branches, [&](const BranchList<MaskBranch<T>>& list, int64_t strips) {
    launch.run("mask_rows_kernel", kernel, strips, chunks.count, kColumnThreads, list, static_cast<const T*>(grad.data),
               grad.stride, out ? static_cast<const T*>(out->data) : nullptr, out ? out->stride : 0, chunks, sums,
               total);
  });
  if (grad_bias) {
    launch.run("add_up_chunks_kernel", add_up_chunks_kernel<C, Out>, ceil_div<int64_t>(total, 32), 1, kChunkThreads,
               sums, chunks.count, total, grad_bias);
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
    std::optional<RowView> result;
    if (out) result = rows_of(*out), own.emplace(grad_out, channels, result_format(*out));
    with_type(dtype_of("masked gradient", "grad_out", grad_out), [&](auto element) {
      using T = decltype(element);
      const std::vector<MaskBranch<T>> branch{{own ? static_cast<T*>(own->data) : nullptr, channels, 0}};
      mask_rows(launch, rows, result ? &*result : nullptr, branch, channels,
                needs_bias ? static_cast<T*>(bias.data_ptr()) : nullptr, row_count(grad_out));
    });
    if (own) rows = {own->tensor, own->data, channels};
  }
  Tensor residual(const Tensor& grad_out) const { return own ? own->finish() : nothing(grad_out); }
};

}  // namespace fused_cnn
