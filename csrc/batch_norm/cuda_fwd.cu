// fused_cnn::bn_stats, bn_relu_concat_fwd and bn_add_relu_fwd on CUDA. Statistics read x once: every thread merges the
// moments of its rows (Welford's method, four rows at a time), a block those of its threads, a second kernel those of
// the blocks, in order. The rest is one pass: it reads the inputs and writes the result, and ReLU's mask in one bit an
// element where a backward will want it.
#include <cmath>
#include <optional>
#include <tuple>
#include "batch_norm/cuda_inputs.cuh"

namespace fused_cnn {
namespace {

// partial[chunk] = the means of its rows for all `total` channels, then the sums of squared differences from them.
template <typename T, bool kVectors>
__global__ void __launch_bounds__(kColumnThreads, kBlocks<T, kVectors>)
    bn_moments_kernel(const __grid_constant__ BranchList<BnBranch<T>> list, Chunks chunks,
                      compute_t<T>* __restrict__ partial, int64_t total) {
  using C = compute_t<T>;
  constexpr int kRows = sizeof(T) == 8 ? 2 : 4;
  const BranchPlace place(list, chunks);
  const BnInput<T>& in = place.branch.in[0];
  C count = 0, mean[kOctet] = {}, m2[kOctet] = {};
  for (int64_t row = place.row; row < place.end; row += static_cast<int64_t>(place.step) * kRows) {
    Octet<T> x[kRows];
    int more = 0;
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int64_t r = row + u * place.step;
      if (r < place.end) x[u] = load_octet<kVectors>(in.x + r * in.pitch + place.channel, place.n), ++more;
    }
    const C n = static_cast<C>(more), share = n / (count + n), inverse = 1 / n;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      C sum = 0, squares = 0;
#pragma unroll
      for (int u = 0; u < kRows; ++u) sum += u < more ? to_compute(x[u].v[j]) : C(0);
      const C middle = sum * inverse;
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const C off = u < more ? to_compute(x[u].v[j]) - middle : C(0);
        squares += off * off;
      }
      batch_norm::merge_moments<C>(mean[j], m2[j], middle, squares, share, count * share);
    }
    count += n;
  }
  // Of all rows of the block: first the mean, then every thread's squares about it.
  __shared__ C block_mean[kStrip];
  const C all = static_cast<C>(chunks.length(blockIdx.y));
  C weighted[kOctet];
#pragma unroll
  for (int j = 0; j < kOctet; ++j) weighted[j] = count * mean[j];
  add_up_block(weighted, place, [&](int64_t channel, C sum) { block_mean[channel % kStrip] = sum / all; });
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    const C off = j < place.n ? mean[j] - block_mean[place.channel % kStrip + j] : C(0);
    m2[j] += count * off * off;
  }
  C* to = partial + blockIdx.y * 2 * total + place.branch.first;
  add_up_block(m2, place, [&](int64_t channel, C sum) {
    to[channel] = block_mean[channel % kStrip];
    to[total + channel] = sum;
  });
}

// Mean, 1 / sqrt(biased variance + eps) and unbiased variance of the list's channels, in double.
template <typename T, typename C = compute_t<T>>
__global__ void __launch_bounds__(kChunkThreads)
    bn_finish_stats_kernel(const __grid_constant__ BranchList<BnBranch<T>> list, const C* __restrict__ partial,
                           Chunks chunks, int64_t total, C* __restrict__ mean, C* __restrict__ rstd,
                           C* __restrict__ var) {
  const ChunkPlace place(chunks.count);
  double eps = 0;
  int64_t channels = 0;
  for (const BnBranch<T>& branch : list.branch) {
    if (place.channel >= channels) eps = branch.eps;
    channels += branch.channels;
    if (place.channel < channels) break;
  }
  const bool inside = place.channel < channels;
  const int64_t channel = list.branch[0].first + place.channel;
  double sum = 0;
  if (inside) {
#pragma unroll 4
    for (int64_t i = place.chunk; i < place.end; ++i)
      sum += static_cast<double>(chunks.length(i)) * partial[i * 2 * total + channel];
  }
  const double n = static_cast<double>(chunks.rows), center = add_up_parts(sum) / n;
  double squares = 0;
  if (inside) {
#pragma unroll 4
    for (int64_t i = place.chunk; i < place.end; ++i) {
      const C* of_chunk = partial + i * 2 * total + channel;
      const double off = of_chunk[0] - center;
      squares += of_chunk[total] + static_cast<double>(chunks.length(i)) * off * off;
    }
  }
  squares = add_up_parts(squares);
  if (!place.first || !inside) return;
  mean[channel] = static_cast<C>(center);
  rstd[channel] = static_cast<C>(1 / sqrt(squares / n + eps));
  var[channel] = static_cast<C>(squares / (n - 1));
}

// y = bn(x), plus the residual as it is or normalised, under ReLU; ReLU's mask to `bits`, unless null.
template <typename T, bool kVectors, Residual kResidual>
__global__ void __launch_bounds__(kColumnThreads, kBlocks<T, kVectors>)
    bn_apply_kernel(const __grid_constant__ BranchList<BnBranch<T>> list, bool use_relu, uint8_t* __restrict__ bits,
                    Chunks chunks) {
  using C = compute_t<T>;
  constexpr int kTensors = kResidual == Residual::none ? 1 : 2, kRows = kInFlight<T, kTensors>;
  const BranchPlace place(list, chunks);
  const BnBranch<T>& branch = place.branch;
  const int64_t mask_pitch = mask_bytes(branch.channels);
  const auto v = BnVectors<T>::template load<kVectors>(branch.in[0], place);
  BnVectors<T> w;
  if constexpr (kResidual == Residual::normalized) w = BnVectors<T>::template load<kVectors>(branch.in[1], place);
  Octet<T> x[kRows], residual[kRows];
  for_rows<kRows>(
      place,
      [&](int u, int64_t row) {
        x[u] = load_octet<kVectors>(branch.in[0].x + row * branch.in[0].pitch + place.channel, place.n);
        if constexpr (kResidual != Residual::none) {
          residual[u] = load_octet<kVectors>(branch.in[1].x + row * branch.in[1].pitch + place.channel, place.n);
        }
      },
      [&](int u, int64_t row) {
        uint32_t byte = 0;
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          C y = v.normalize(x[u].v[j], j);
          if constexpr (kResidual == Residual::plain) y += to_compute(residual[u].v[j]);
          if constexpr (kResidual == Residual::normalized) y += w.normalize(residual[u].v[j], j);
          if (!(y <= 0) && j < place.n) byte |= 1u << j;
          from_compute(use_relu ? relu(y) : y, &x[u].v[j]);
        }
        store_octet<kVectors>(branch.y + row * branch.y_pitch + place.channel, x[u], place.n);
        if (bits) bits[row * mask_pitch + place.channel / 8] = static_cast<uint8_t>(byte);
      });
}

template <typename T>
void apply(const BnInputs& in, const std::vector<BnBranch<T>>& branches, Residual residual, bool relu, uint8_t* bits) {
  const auto pick = [&](auto vectors) {
    constexpr bool kVectors = decltype(vectors)::value;
    return residual == Residual::none    ? bn_apply_kernel<T, kVectors, Residual::none>
           : residual == Residual::plain ? bn_apply_kernel<T, kVectors, Residual::plain>
                                         : bn_apply_kernel<T, kVectors, Residual::normalized>;
  };
  const auto kernel = on_vectors(branches) ? pick(std::true_type{}) : pick(std::false_type{});
  const Chunks chunks = Chunks::of(in.rows, branches);
  in_lists(branches, [&](const BranchList<BnBranch<T>>& list, int64_t strips) {
    in.launch.run("bn_apply_kernel", kernel, strips, chunks.count, kColumnThreads, list, relu, bits, chunks);
  });
}

std::tuple<Tensor, Tensor, Tensor> bn_stats(const std::vector<Tensor>& xs, const std::vector<double>& eps) {
  const char* op = "bn_stats";
  const int64_t total = check_statistics(op, xs, eps), rows = row_count(xs[0]);
  const DType dtype = dtype_of(op, "x", xs[0]);
  const Launch launch(xs[0]);
  const auto vector = [&](int64_t size) { return empty_vector(xs[0], size, vector_dtype(dtype)); };
  Tensor mean = vector(total), rstd = vector(total), var = vector(total);
  std::vector<RowView> views;
  for (const Tensor& x : xs) views.push_back(rows_of(x));
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    using C = compute_t<T>;
    std::vector<BnBranch<T>> branches;
    int64_t first = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      BnBranch<T> branch{};
      branch.channels = xs[i].size(1), branch.first = first, branch.eps = eps[i];
      branch.in[0].x = static_cast<const T*>(views[i].data), branch.in[0].pitch = views[i].stride;
      branches.push_back(branch);
      first += branch.channels;
    }
    const auto kernel = on_vectors(branches) ? bn_moments_kernel<T, true> : bn_moments_kernel<T, false>;
    const Chunks chunks = Chunks::of(rows, branches);
    const Tensor scratch = vector(chunks.count * 2 * total);
    const auto of = [](const Tensor& t) { return static_cast<C*>(t.data_ptr()); };
    in_lists(branches, [&](const BranchList<BnBranch<T>>& list, int64_t strips) {
      launch.run("bn_moments_kernel", kernel, strips, chunks.count, kColumnThreads, list, chunks, of(scratch), total);
      int64_t channels = 0;
      for (const BnBranch<T>& branch : list.branch) channels += branch.channels;
      launch.run("bn_finish_stats_kernel", bn_finish_stats_kernel<T>, ceil_div<int64_t>(channels, 32), 1, kChunkThreads,
                 list, of(scratch), chunks, total, of(mean), of(rstd), of(var));
    });
  });
  return {mean, rstd, var};
}

Tensor bn_relu_concat_fwd(const std::vector<Tensor>& xs, const Tensor& mean, const Tensor& rstd,
                          const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, bool relu) {
  const char* op = "bn_relu_concat_fwd";
  const BnInputs in(op, xs, mean, rstd, weights, biases);
  const RowResult out(xs[0], in.total, result_format(xs[0]));
  with_type(in.dtype, [&](auto element) {
    using T = decltype(element);
    std::vector<BnBranch<T>> branches = in.branches<T>();
    for (BnBranch<T>& branch : branches) {
      branch.y = static_cast<T*>(out.data) + branch.first, branch.y_pitch = in.total;
    }
    apply(in, branches, Residual::none, relu, nullptr);
  });
  return out.finish();
}

std::tuple<Tensor, Tensor> bn_add_relu_fwd(const Tensor& x, const Tensor& residual, const Tensor& mean,
                                           const Tensor& rstd, const std::vector<Tensor>& weights,
                                           const std::vector<Tensor>& biases, bool save_mask) {
  const char* op = "bn_add_relu_fwd";
  const BnInputs in(op, normalized_inputs(op, x, residual, weights.size()), mean, rstd, weights, biases);
  const bool plain = weights.size() == 1;
  const RowView addend = rows_of(residual);
  const RowResult out(x, x.size(1), result_format(x));
  Tensor mask = empty_mask(x, plain && save_mask ? in.rows : 0);
  uint8_t* bits = plain && save_mask ? static_cast<uint8_t*>(mask.data_ptr()) : nullptr;
  with_type(in.dtype, [&](auto element) {
    using T = decltype(element);
    std::vector<BnBranch<T>> branches = in.branch_with<T>(plain ? &addend : nullptr);
    branches[0].y = static_cast<T*>(out.data), branches[0].y_pitch = x.size(1);
    apply(in, branches, plain ? Residual::plain : Residual::normalized, true, bits);
  });
  return {out.finish(), mask};
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("bn_stats", FUSED_CNN_BOX(&fused_cnn::bn_stats));
  m.impl("bn_relu_concat_fwd", FUSED_CNN_BOX(&fused_cnn::bn_relu_concat_fwd));
  m.impl("bn_add_relu_fwd", FUSED_CNN_BOX(&fused_cnn::bn_add_relu_fwd));
}
