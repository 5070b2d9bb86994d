// fused_cnn::concat_bias_relu_fwd and _bwd on CUDA. Forward: all branches in one launch, each element read once and
// written once, 16 bytes at a time where everything lies on 16 bytes. Backward: the same with ReLU's mask, and the
// bias's gradient added up on the way (common/columns.cuh).
#include <algorithm>
#include <optional>
#include <tuple>
#include "common/columns.cuh"
#include "concat_bias_relu/math.h"

namespace fused_cnn {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;
constexpr int kBranches = 8;  // of one launch

template <typename T>
struct Branch {
  const T* x;
  int64_t stride, channels, first;
};
template <typename T>
struct Branches {
  Branch<T> branch[kBranches];
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    concat_bias_relu_fwd_kernel(Branches<T> branches, const compute_t<T>* __restrict__ bias, bool use_relu,
                                T* __restrict__ out, int64_t out_stride, int64_t rows) {
  using C = compute_t<T>;
  const Branch<T> branch = branches.branch[blockIdx.y];
  const uint32_t per_row = static_cast<uint32_t>(branch.channels / V);
  const int64_t packs = rows * per_row, begin = static_cast<int64_t>(blockIdx.x) * kThreads * kUnroll + threadIdx.x;
  // Within a block's packs 32 bits are enough to tell rows from channels.
  const int64_t first_row = per_row == 0 ? 0 : (begin - threadIdx.x) / per_row;
  const uint32_t skip = per_row == 0 ? 0 : static_cast<uint32_t>((begin - threadIdx.x) - first_row * per_row);
  Pack<T, V> x[kUnroll];
  int64_t row[kUnroll];
  uint32_t channel[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (begin + u * kThreads < packs) {
      const uint32_t at = skip + threadIdx.x + u * kThreads;
      row[u] = first_row + at / per_row;
      channel[u] = at % per_row * V;
      x[u] = *reinterpret_cast<const Pack<T, V>*>(branch.x + row[u] * branch.stride + channel[u]);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (begin + u * kThreads < packs) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const C v = to_compute(x[u].v[j]), b = bias ? bias[branch.first + channel[u] + j] : C(0);
        from_compute(use_relu ? concat_bias_relu::forward(v, b) : v + b, &x[u].v[j]);
      }
      *reinterpret_cast<Pack<T, V>*>(out + row[u] * out_stride + branch.first + channel[u]) = x[u];
    }
  }
}

// grad_x = grad_out under the mask of `out` (null: all of it); partial[chunk][channel] = its sums, unless null.
template <typename T, int V>
__global__ void __launch_bounds__(kColumnThreads)
    concat_bias_relu_bwd_kernel(const T* __restrict__ grad_out, int64_t grad_stride, const T* __restrict__ out,
                                int64_t out_stride, T* __restrict__ grad_x, int64_t channels, int64_t rows,
                                compute_t<T>* __restrict__ partial) {
  using C = compute_t<T>;
  using P = Pack<T, V>;
  const Place<V> place(rows);
  C sums[V] = {};
  if (place.channel < channels) {
    for (int64_t row = place.row; row < place.end; row += Place<V>::step * kRowsInFlight) {
      P g[kRowsInFlight], o[kRowsInFlight];
#pragma unroll
      for (int u = 0; u < kRowsInFlight; ++u) {
        const int64_t r = row + u * Place<V>::step;
        if (r < place.end) {
          g[u] = *reinterpret_cast<const P*>(grad_out + r * grad_stride + place.channel);
          if (out) o[u] = *reinterpret_cast<const P*>(out + r * out_stride + place.channel);
        }
      }
#pragma unroll
      for (int u = 0; u < kRowsInFlight; ++u) {
        const int64_t r = row + u * Place<V>::step;
        if (r < place.end) {
#pragma unroll
          for (int j = 0; j < V; ++j) {
            C v = to_compute(g[u].v[j]);
            if (out) v = concat_bias_relu::backward(v, to_compute(o[u].v[j]));
            sums[j] += v;
            from_compute(v, &g[u].v[j]);
          }
          *reinterpret_cast<P*>(grad_x + r * channels + place.channel) = g[u];
        }
      }
    }
  }
  if (partial) add_up_block<V>(sums, partial, channels, place);
}

template <typename T>
bool on_vectors(const void* data, int64_t stride, int64_t channels, int64_t first = 0) {
  constexpr int V = Vec<T>::size;
  return aligned16(data) && stride % V == 0 && channels % V == 0 && first % V == 0;
}

template <typename T, int V>
void forward(const Launch& launch, const std::vector<Branch<T>>& branches, const compute_t<T>* bias, bool relu, T* out,
             int64_t total, int64_t rows) {
  for (size_t begin = 0; begin < branches.size(); begin += kBranches) {
    Branches<T> some{};
    int64_t count = 0, packs = 0;
    for (size_t i = begin; i < branches.size() && count < kBranches; ++i) {
      some.branch[count++] = branches[i];
      packs = std::max(packs, rows * (branches[i].channels / V));
    }
    if (packs == 0) continue;
    launch.run("concat_bias_relu_fwd_kernel", concat_bias_relu_fwd_kernel<T, V>,
               ceil_div<int64_t>(packs, kThreads * kUnroll), count, kThreads, some, bias, relu, out, total, rows);
  }
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
    using C = compute_t<T>;
    std::vector<Branch<T>> list;
    bool vectors = on_vectors<T>(out.data, total, total);
    int64_t first = 0;
    for (size_t i = 0; i < branches.size(); ++i) {
      const int64_t channels = branches[i].size(1);
      list.push_back({static_cast<const T*>(views[i].data), views[i].stride, channels, first});
      vectors = vectors && on_vectors<T>(views[i].data, views[i].stride, channels, first);
      first += channels;
    }
    const auto run = vectors ? forward<T, Vec<T>::size> : forward<T, 1>;
    run(launch, list, bias ? static_cast<const C*>(vector.data_ptr()) : nullptr, relu, static_cast<T*>(out.data), total,
        rows);
  });
  return out.finish();
}

template <typename T, int V>
void backward(const Launch& launch, const RowView& grad, const RowView* out, int64_t first, int64_t channels,
              int64_t rows, const RowResult& grad_x, Tensor* grad_bias) {
  using C = compute_t<T>;
  const Columns cut = Columns::of<V>(rows, channels);
  Tensor partial;
  C* sums = nullptr;
  if (grad_bias) {
    partial = empty_vector(grad_x.tensor, cut.chunks * channels, grad_bias->scalar_type());
    sums = static_cast<C*>(partial.data_ptr());
  }
  launch.run("concat_bias_relu_bwd_kernel", concat_bias_relu_bwd_kernel<T, V>, cut.strips, cut.chunks, kColumnThreads,
             static_cast<const T*>(grad.data) + first, grad.stride,
             out ? static_cast<const T*>(out->data) + first : nullptr, out ? out->stride : 0,
             static_cast<T*>(grad_x.data), channels, rows, sums);
  if (grad_bias) {
    launch.run("add_up_chunks_kernel", add_up_chunks_kernel<C>, ceil_div<int64_t>(channels, 32), 1, kColumnThreads,
               sums, cut.chunks, channels, static_cast<C*>(grad_bias->data_ptr()) + first);
  }
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
  if (bias && rows == 0) torch::stable::zero_(grad_bias);
  std::vector<Tensor> grads;
  int64_t first = 0;
  for (const int64_t c : channels) {
    const RowResult grad_x(grad_out, c, format);
    if (rows * c > 0) {
      with_type(dtype, [&](auto element) {
        using T = decltype(element);
        const bool vectors = on_vectors<T>(grad.data, grad.stride, c, first) && aligned16(grad_x.data) &&
                             (!outs || on_vectors<T>(outs->data, outs->stride, c, first));
        const auto run = vectors ? backward<T, Vec<T>::size> : backward<T, 1>;
        run(launch, grad, outs ? &*outs : nullptr, first, c, rows, grad_x, bias ? &grad_bias : nullptr);
      });
    }
    grads.push_back(grad_x.finish());
    first += c;
  }
  return {grads, grad_bias};
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("concat_bias_relu_fwd", TORCH_BOX(&fused_cnn::concat_bias_relu_fwd));
  m.impl("concat_bias_relu_bwd", TORCH_BOX(&fused_cnn::concat_bias_relu_bwd));
}
