// fused_cnn::concat_bias_relu_fwd and _bwd on CUDA: all branches in one launch, each element read once and written
// once, 16 bytes at a time where everything lies on 16 bytes. Backward adds the bias's gradient up on the way
// (common/columns.cuh).
#include <optional>
#include <tuple>
#include "common/columns.cuh"
#include "concat_bias_relu/math.h"

namespace fused_cnn {
namespace {

// A branch, or its gradient, and where it begins in the concatenation.
template <typename T>
struct Branch {
  T* x;
  int64_t pitch, channels, first;
};

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kColumnThreads, kBlocks<T, kVectors>)
    concat_bias_relu_fwd_kernel(const __grid_constant__ BranchList<Branch<T>> list,
                                const compute_t<T>* __restrict__ bias, bool use_relu, T* __restrict__ out,
                                int64_t out_pitch, Chunks chunks) {
  using C = compute_t<T>;
  const BranchPlace place(list, chunks);
  const Branch<T>& branch = place.branch;
  const int64_t to = branch.first + place.channel;
  Octet<C> b{};
  if (bias) b = load_octet<false>(bias + to, place.n);
  Octet<T> x[kInFlight<T, 1>];
  for_rows<kInFlight<T, 1>>(
      place,
      [&](int u, int64_t row) { x[u] = load_octet<kVectors>(branch.x + row * branch.pitch + place.channel, place.n); },
      [&](int u, int64_t row) {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          const C v = to_compute(x[u].v[j]);
          from_compute(use_relu ? concat_bias_relu::forward(v, b.v[j]) : v + b.v[j], &x[u].v[j]);
        }
        store_octet<kVectors>(out + row * out_pitch + to, x[u], place.n);
      });
}

// Each branch's x receives grad_out under the mask of `out` (null: all of it); partial[chunk][channel] its sums, unless
// null.
template <typename T, bool kVectors>
__global__ void __launch_bounds__(kColumnThreads, kBlocks<T, kVectors>)
    concat_bias_relu_bwd_kernel(const __grid_constant__ BranchList<Branch<T>> list, const T* __restrict__ grad_out,
                                int64_t grad_pitch, const T* __restrict__ out, int64_t out_pitch, Chunks chunks,
                                compute_t<T>* __restrict__ partial, int64_t total) {
  using C = compute_t<T>;
  const BranchPlace place(list, chunks);
  const Branch<T>& branch = place.branch;
  const int64_t from = branch.first + place.channel;
  C sums[kOctet] = {};
  Octet<T> g[kInFlight<T, 2>], o[kInFlight<T, 2>];
  for_rows<kInFlight<T, 2>>(
      place,
      [&](int u, int64_t row) {
        g[u] = load_octet<kVectors>(grad_out + row * grad_pitch + from, place.n);
        if (out) o[u] = load_octet<kVectors>(out + row * out_pitch + from, place.n);
      },
      [&](int u, int64_t row) {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          C v = to_compute(g[u].v[j]);
          if (out) v = concat_bias_relu::backward(v, to_compute(o[u].v[j]));
          sums[j] += v;
          from_compute(v, &g[u].v[j]);
        }
        store_octet<kVectors>(branch.x + row * branch.pitch + place.channel, g[u], place.n);
      });
  if (!partial) return;
  add_up_block(sums, place,
               [&](int64_t channel, C sum) { partial[blockIdx.y * total + branch.first + channel] = sum; });
}

template <typename C>
__global__ void __launch_bounds__(kChunkThreads)
    add_up_chunks_kernel(const C* __restrict__ partial, int64_t chunks, int64_t channels, C* __restrict__ out) {
  const ChunkPlace place(chunks);
  double sum = 0;
  if (place.channel < channels) {
#pragma unroll 4
    for (int64_t i = place.chunk; i < place.end; ++i) sum += partial[i * channels + place.channel];
  }
  sum = add_up_parts(sum);
  if (place.first && place.channel < channels) out[place.channel] = static_cast<C>(sum);
}

template <typename T>
bool all_on_vectors(const std::vector<Branch<T>>& branches) {
  return std::all_of(branches.begin(), branches.end(), [](const Branch<T>& b) {
    return on_vectors(b.x, b.pitch, sizeof(T)) && b.channels % kOctet == 0 && b.first % kOctet == 0;
  });
}

Tensor concat_bias_relu_fwd(const std::vector<Tensor>& branches, const std::optional<Tensor>& bias, bool relu) {
  const char* op = "concat_bias_relu_fwd";
  const int64_t total = check_branches(op, branches), rows = row_count(branches[0]);
  const DType dtype = dtype_of(op, "branch 0", branches[0]);
  const Launch launch(branches[0]);
  Tensor vector;
  if (bias) vector = checked_vector(op, "bias", *bias, total, branches[0], vector_dtype(dtype));
  std::vector<RowView> views;
  for (const Tensor& branch : branches) views.push_back(rows_of(branch));
  const RowResult out(branches[0], total, result_format(branches[0]));
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    std::vector<Branch<T>> list;
    int64_t first = 0;
    for (size_t i = 0; i < branches.size(); ++i) {
      const int64_t channels = branches[i].size(1);
      list.push_back({static_cast<T*>(views[i].data), views[i].stride, channels, first});
      first += channels;
    }
    const bool vectors = all_on_vectors(list) && on_vectors(out.data, total, sizeof(T));
    const auto kernel = vectors ? concat_bias_relu_fwd_kernel<T, true> : concat_bias_relu_fwd_kernel<T, false>;
    const Chunks chunks = Chunks::of(rows, list);
    in_lists(list, [&](const BranchList<Branch<T>>& some, int64_t strips) {
      launch.run("concat_bias_relu_fwd_kernel", kernel, strips, chunks.count, kColumnThreads, some,
                 bias ? static_cast<const compute_t<T>*>(vector.data_ptr()) : nullptr, relu, static_cast<T*>(out.data),
                 total, chunks);
    });
  });
  return out.finish();
}

std::tuple<std::vector<Tensor>, Tensor> concat_bias_relu_bwd(const Tensor& grad_out, const std::optional<Tensor>& out,
                                                             const std::vector<int64_t>& channels, bool bias) {
  const char* op = "concat_bias_relu_bwd";
  const int64_t total = check_concatenation(op, grad_out, out, channels);
  const DType dtype = dtype_of(op, "grad_out", grad_out);
  const Launch launch(grad_out);
  const int64_t rows = row_count(grad_out);
  const RowView grad = rows_of(grad_out);
  std::optional<RowView> outs;
  if (out) outs = rows_of(*out);
  const MemoryFormat format = result_format(out ? *out : grad_out);
  Tensor grad_bias = empty_vector(grad_out, bias ? total : 0, vector_dtype(dtype));
  std::vector<RowResult> results;
  for (const int64_t c : channels) results.emplace_back(grad_out, c, format);
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    using C = compute_t<T>;
    std::vector<Branch<T>> list;
    int64_t first = 0;
    for (size_t i = 0; i < channels.size(); ++i) {
      list.push_back({static_cast<T*>(results[i].data), channels[i], channels[i], first});
      first += channels[i];
    }
    const bool vectors = all_on_vectors(list) && on_vectors(grad.data, grad.stride, sizeof(T)) &&
                         (!outs || on_vectors(outs->data, outs->stride, sizeof(T)));
    const auto kernel = vectors ? concat_bias_relu_bwd_kernel<T, true> : concat_bias_relu_bwd_kernel<T, false>;
    const Chunks chunks = Chunks::of(rows, list);
    Tensor partial;
    C* sums = nullptr;
    if (bias) {
      partial = empty_vector(grad_out, chunks.count * total, grad_bias.scalar_type());
      sums = static_cast<C*>(partial.data_ptr());
    }
    in_lists(list, [&](const BranchList<Branch<T>>& some, int64_t strips) {
      launch.run("concat_bias_relu_bwd_kernel", kernel, strips, chunks.count, kColumnThreads, some,
                 static_cast<const T*>(grad.data), grad.stride, outs ? static_cast<const T*>(outs->data) : nullptr,
                 outs ? outs->stride : 0, chunks, sums, total);
    });
    if (bias) {
      launch.run("add_up_chunks_kernel", add_up_chunks_kernel<C>, ceil_div<int64_t>(total, 32), 1, kChunkThreads, sums,
                 chunks.count, total, static_cast<C*>(grad_bias.data_ptr()));
    }
  });
  std::vector<Tensor> grads;
  for (const RowResult& result : results) grads.push_back(result.finish());
  return {grads, grad_bias};
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("concat_bias_relu_fwd", TORCH_BOX(&fused_cnn::concat_bias_relu_fwd));
  m.impl("concat_bias_relu_bwd", TORCH_BOX(&fused_cnn::concat_bias_relu_bwd));
}
