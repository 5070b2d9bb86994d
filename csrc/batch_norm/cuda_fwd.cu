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
// Grid (channel tiles, row chunks), 256 threads. Reads x once: memory's bandwidth is the limit. ResNet-50's 49 (batch
// 256, bfloat16, training) moved at 0.60 of the copy's on an H200 (2026-11-26).
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kColumnThreads, kBlocksPerSm<T, kAligned>)
    bn_moments_kernel(const __grid_constant__ BranchList<BnBranch<T>> list, RowChunks chunks,
                      compute_t<T>* __restrict__ partial, int64_t total) {
  using C = compute_t<T>;
  constexpr int kRows = sizeof(T) == 8 ? 2 : 4;
  const ThreadTile tile(list, chunks);
  const BnInput<T>& in = tile.branch->in[0];
  C count = 0, mean[kVec] = {}, m2[kVec] = {};
  for (int64_t row = tile.row; row < tile.end; row += static_cast<int64_t>(tile.step) * kRows) {
    Vec8<T> x[kRows];
    int more = 0;
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int64_t r = row + u * tile.step;
      if (r < tile.end) {
        x[u] = load_vec8<kAligned>(in.x + r * in.pitch + tile.channel, tile.n);
        ++more;
      }
    }
    const C n = static_cast<C>(more), share = n / (count + n), inverse = 1 / n;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
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
  __shared__ C block_mean[kTileChannels];
  const C all = static_cast<C>(chunks.length(blockIdx.y));
  C weighted[kVec];
#pragma unroll
  for (int j = 0; j < kVec; ++j) weighted[j] = count * mean[j];
  block_reduce_columns(weighted, tile,
                       [&](int64_t channel, C sum) { block_mean[channel % kTileChannels] = sum / all; });
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const C off = j < tile.n ? mean[j] - block_mean[tile.channel % kTileChannels + j] : C(0);
    m2[j] += count * off * off;
  }
  C* to = partial + blockIdx.y * 2 * total + tile.branch->first;
  block_reduce_columns(m2, tile, [&](int64_t channel, C sum) {
    to[channel] = block_mean[channel % kTileChannels];
    to[total + channel] = sum;
  });
}

// Mean, 1 / sqrt(biased variance + eps) and unbiased variance of the list's channels, in double. Grid (channels / 32),
// 512 threads. It reads little, and waits for it: 15 microseconds each in ResNet-50 on an H200 (2026-11-26).
template <typename T, typename C = compute_t<T>>
__global__ void __launch_bounds__(kReduceThreads)
    bn_finish_stats_kernel(const __grid_constant__ BranchList<BnBranch<T>> list, const C* __restrict__ partial,
                           RowChunks chunks, int64_t total, C* __restrict__ mean, C* __restrict__ rstd,
                           C* __restrict__ var) {
  const int64_t of_list = reduce_channel(), channel = list.branch[0].first + of_list;
  double eps = 0;
  int64_t channels = 0;
  for (const BnBranch<T>& branch : list.branch) {
    if (of_list >= channels) eps = branch.eps;
    channels += branch.channels;
    if (of_list < channels) break;
  }
  const bool inside = of_list < channels;
  const double n = static_cast<double>(chunks.rows);
  const double center = reduce_chunks(chunks.count, inside,
                                      [&](int64_t i) {
                                        return static_cast<double>(chunks.length(i)) * partial[i * 2 * total + channel];
                                      }) /
                        n;
  const double squares = reduce_chunks(chunks.count, inside, [&](int64_t i) {
    const C* of_chunk = partial + i * 2 * total + channel;
    const double off = of_chunk[0] - center;
    return of_chunk[total] + static_cast<double>(chunks.length(i)) * off * off;
  });
  if (threadIdx.x >= 32 || !inside) return;
  mean[channel] = static_cast<C>(center);
  rstd[channel] = static_cast<C>(1 / sqrt(squares / n + eps));
  var[channel] = static_cast<C>(squares / (n - 1));
}

// y = bn(x), plus the residual as it is or normalised, under ReLU; ReLU's mask to `mask`, unless null.
// Grid (channel tiles, row chunks), 256 threads. Reads the inputs and writes y and the mask once: the copy's bandwidth
// is the limit. ResNet-50's (batch 256, bfloat16, training) moved at 0.84 of it without a residual, 0.89 with a plain
// one and its mask, 0.85 with a normalised one, on an H200 (2026-11-26).
template <typename T, bool kAligned, Residual kResidual>
__global__ void __launch_bounds__(kColumnThreads, kBlocksPerSm<T, kAligned>)
    bn_apply_kernel(const __grid_constant__ BranchList<BnBranch<T>> list, RowChunks chunks, bool use_relu,
                    uint8_t* __restrict__ mask) {
  using C = compute_t<T>;
  constexpr int kTensors = kResidual == Residual::none ? 1 : 2, kRows = kInFlight<T, kTensors>;
  const ThreadTile tile(list, chunks);
  const BnBranch<T>& branch = *tile.branch;
  const int64_t mask_pitch = mask_bytes(branch.channels);
  const auto v = BnVectors<T>::template load<kAligned>(branch.in[0], tile);
  BnVectors<T> w;
  if constexpr (kResidual == Residual::normalized) w = BnVectors<T>::template load<kAligned>(branch.in[1], tile);
  Vec8<T> x[kRows], residual[kRows];
  for_rows<kRows>(
      tile,
      [&](int u, int64_t row) {
        x[u] = load_vec8<kAligned>(branch.in[0].x + row * branch.in[0].pitch + tile.channel, tile.n);
        if constexpr (kResidual != Residual::none) {
          residual[u] = load_vec8<kAligned>(branch.in[1].x + row * branch.in[1].pitch + tile.channel, tile.n);
        }
      },
      [&](int u, int64_t row) {
        uint32_t byte = 0;
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          C y = v.normalize(x[u].v[j], j);
          if constexpr (kResidual == Residual::plain) y += to_compute(residual[u].v[j]);
          if constexpr (kResidual == Residual::normalized) y += w.normalize(residual[u].v[j], j);
          if (!(y <= 0) && j < tile.n) byte |= 1u << j;
          from_compute(use_relu ? relu(y) : y, &x[u].v[j]);
        }
        store_vec8<kAligned>(branch.y + row * branch.y_pitch + tile.channel, x[u], tile.n);
        if (mask) mask[row * mask_pitch + tile.channel / 8] = static_cast<uint8_t>(byte);
      });
}

template <typename T, Residual kResidual>
void apply(const BnInputs& in, const std::vector<BnBranch<T>>& branches, bool relu, uint8_t* mask) {
  launch_columns(in.launch, "bn_apply_kernel",
                 aligned16(branches) ? bn_apply_kernel<T, true, kResidual> : bn_apply_kernel<T, false, kResidual>,
                 branches, RowChunks::of(in.rows, branches), relu, mask);
}

std::tuple<Tensor, Tensor, Tensor> bn_stats(const Tensors& xs, const std::vector<double>& eps) {
  const char* op = "bn_stats";
  const int64_t total = check_statistics(op, xs, eps);
  const DType dtype = dtype_of(op, "x", xs[0]);
  const Launch launch(xs[0]);
  const auto vector = [&](int64_t size) { return empty_vector(xs[0], size, vector_dtype(dtype)); };
  const Tensor mean = vector(total), rstd = vector(total), var = vector(total);
  std::vector<RowView> views;
  for (const Tensor& x : xs) views.push_back(rows_of(x));
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    using C = compute_t<T>;
    std::vector<BnBranch<T>> branches;
    int64_t first = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      branches.push_back({.channels = xs[i].size(1),
                          .first = first,
                          .in = {{.x = static_cast<const T*>(views[i].data), .pitch = views[i].stride}},
                          .eps = eps[i]});
      first += xs[i].size(1);
    }
    const auto moments = aligned16(branches) ? bn_moments_kernel<T, true> : bn_moments_kernel<T, false>;
    const RowChunks chunks = RowChunks::of(row_count(xs[0]), branches);
    const Tensor partial = vector(chunks.count * 2 * total);
    launch_columns(launch, "bn_moments_kernel", moments, branches, chunks, data_of<C>(partial), total);
    for (const BranchList<BnBranch<T>>& list : branch_lists(branches)) {
      int64_t channels = 0;
      for (const BnBranch<T>& branch : list.branch) channels += branch.channels;
      launch_reduce(launch, "bn_finish_stats_kernel", bn_finish_stats_kernel<T>, channels, list, data_of<C>(partial),
                    chunks, total, data_of<C>(mean), data_of<C>(rstd), data_of<C>(var));
    }
  });
  return {mean, rstd, var};
}

Tensor bn_relu_concat_fwd(const Tensors& xs, const Tensor& mean, const Tensor& rstd, const Tensors& weights,
                          const Tensors& biases, bool relu) {
  const BnInputs in("bn_relu_concat_fwd", xs, mean, rstd, weights, biases);
  const RowResult out(xs[0], in.total, result_format(xs[0]));
  with_type(in.dtype, [&](auto element) {
    using T = decltype(element);
    apply<T, Residual::none>(in, in.branches<T>(out.data, in.total), relu, /*mask=*/nullptr);
  });
  return out.finish();
}

std::tuple<Tensor, Tensor> bn_add_relu_fwd(const Tensor& x, const Tensor& residual, const Tensor& mean,
                                           const Tensor& rstd, const Tensors& weights, const Tensors& biases,
                                           bool save_mask) {
  const char* op = "bn_add_relu_fwd";
  const BnInputs in(op, normalized_inputs(op, x, residual, weights.size()), mean, rstd, weights, biases);
  const bool plain = weights.size() == 1;
  const RowView addend = rows_of(residual);
  const RowResult out(x, x.size(1), result_format(x));
  const Tensor mask = empty_mask(x, plain && save_mask ? in.rows : 0);
  with_type(in.dtype, [&](auto element) {
    using T = decltype(element);
    const BnInput<T> added =
        plain ? BnInput<T>{.x = static_cast<const T*>(addend.data), .pitch = addend.stride} : in.input<T>(1);
    const BnBranch<T> branch{
        .channels = x.size(1), .in = {in.input<T>(0), added}, .y = static_cast<T*>(out.data), .y_pitch = x.size(1)};
    const auto run = plain ? apply<T, Residual::plain> : apply<T, Residual::normalized>;
    run(in, {branch}, /*relu=*/true, plain && save_mask ? data_of<uint8_t>(mask) : nullptr);
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
