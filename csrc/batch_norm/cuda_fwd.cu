// batch_norm's forward on CUDA, and the registration of its ops. Statistics read x once: every thread merges the
// moments of its rows (Welford's method, four rows at a time), a block those of its threads, a second kernel those of
// the blocks, in order. The rest is one pass: it reads the inputs and writes the result, and ReLU's mask in one bit an
// element where a backward will want it.
#include <cmath>
#include "batch_norm/cuda_vectors.cuh"

namespace fused_cnn {
namespace {

// partial[chunk] = the means of its rows for all `total` channels, then the sums of squared differences from them.
// Grid (channel tiles, row chunks), 256 threads. Reads x once: memory's bandwidth is the limit. ResNet-50's 49 (batch
// 256, bfloat16, training) moved at 0.60 of the copy's on an H200 (2026-11-26).
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kColumnThreads, kBlocksPerSm<T, kAligned>)
    bn_moments_kernel(const __grid_constant__ BranchList<BnBranch> list, RowChunks chunks,
                      compute_t<T>* __restrict__ partial, int64_t total) {
  using C = compute_t<T>;
  constexpr int kRows = sizeof(T) == 8 ? 2 : 4;
  const ThreadTile tile(list, chunks);
  const BnInput& in = tile.branch->in[0];
  C count = 0, mean[kVec] = {}, m2[kVec] = {};
  for (int64_t row = tile.row; row < tile.end; row += static_cast<int64_t>(tile.step) * kRows) {
    Vec8<T> x[kRows];
    int more = 0;
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int64_t r = row + u * tile.step;
      if (r < tile.end) {
        x[u] = load_vec8<kAligned>(in.x.at<const T>(r) + tile.channel, tile.n);
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
    bn_finish_stats_kernel(const __grid_constant__ BranchList<BnBranch> list, const C* __restrict__ partial,
                           RowChunks chunks, int64_t total, C* __restrict__ mean, C* __restrict__ rstd,
                           C* __restrict__ var) {
  const int64_t of_list = reduce_channel(), channel = list.branch[0].first + of_list;
  double eps = 0;
  int64_t channels = 0;
  for (const BnBranch& branch : list.branch) {
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
    bn_apply_kernel(const __grid_constant__ BranchList<BnBranch> list, RowChunks chunks, bool use_relu,
                    uint8_t* __restrict__ mask) {
  using C = compute_t<T>;
  constexpr int kTensors = kResidual == Residual::none ? 1 : 2, kRows = kInFlight<T, kTensors>;
  const ThreadTile tile(list, chunks);
  const BnBranch& branch = *tile.branch;
  const int64_t mask_pitch = mask_bytes(branch.channels);
  const auto v = BnVectors<T>::template load<kAligned>(branch.in[0], tile);
  BnVectors<T> w;
  if constexpr (kResidual == Residual::normalized) w = BnVectors<T>::template load<kAligned>(branch.in[1], tile);
  Vec8<T> x[kRows], residual[kRows];
  for_rows<kRows>(
      tile,
      [&](int u, int64_t row) {
        x[u] = load_vec8<kAligned>(branch.in[0].x.at<const T>(row) + tile.channel, tile.n);
        if constexpr (kResidual != Residual::none) {
          residual[u] = load_vec8<kAligned>(branch.in[1].x.at<const T>(row) + tile.channel, tile.n);
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
        store_vec8<kAligned>(branch.y.at<T>(row) + tile.channel, x[u], tile.n);
        if (mask) mask[row * mask_pitch + tile.channel / 8] = static_cast<uint8_t>(byte);
      });
}

template <typename T, Residual kResidual>
void apply(const Launch& launch, const std::vector<BnBranch>& branches, int64_t rows, bool relu, uint8_t* mask) {
  launch_columns(launch, "bn_apply_kernel",
                 aligned16<T>(branches) ? bn_apply_kernel<T, true, kResidual> : bn_apply_kernel<T, false, kResidual>,
                 branches, RowChunks::of(rows, branches), relu, mask);
}

}  // namespace

void bn_statistics(DType dtype, const std::vector<BnBranch>& branches, int64_t rows, const Tensor& mean,
                   const Tensor& rstd, const Tensor& var) {
  const Launch launch(mean);
  const int64_t total = mean.size(0);
  const RowChunks chunks = RowChunks::of(rows, branches);
  const Tensor partial = empty_vector(mean, chunks.count * 2 * total, mean.scalar_type());
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    using C = compute_t<T>;
    const auto moments = aligned16<T>(branches) ? bn_moments_kernel<T, true> : bn_moments_kernel<T, false>;
    launch_columns(launch, "bn_moments_kernel", moments, branches, chunks, data_of<C>(partial), total);
    for (const BranchList<BnBranch>& list : branch_lists(branches)) {
      int64_t channels = 0;
      for (const BnBranch& branch : list.branch) channels += branch.channels;
      launch_reduce(launch, "bn_finish_stats_kernel", bn_finish_stats_kernel<T>, channels, list, data_of<C>(partial),
                    chunks, total, data_of<C>(mean), data_of<C>(rstd), data_of<C>(var));
    }
  });
}

void bn_forward(const NormalizedInputs& in, std::vector<BnBranch> branches, Residual residual, bool relu,
                uint8_t* mask) {
  with_type(in.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = residual == Residual::none    ? apply<T, Residual::none>
                     : residual == Residual::plain ? apply<T, Residual::plain>
                                                   : apply<T, Residual::normalized>;
    run(Launch(in.mean), branches, in.rows, relu, mask);
  });
}

}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("bn_stats", FUSED_CNN_BOX(&fused_cnn::bn_stats));
  m.impl("bn_relu_concat_fwd", FUSED_CNN_BOX(&fused_cnn::bn_relu_concat_fwd));
  m.impl("bn_relu_concat_bwd", FUSED_CNN_BOX(&fused_cnn::bn_relu_concat_bwd));
  m.impl("bn_add_relu_fwd", FUSED_CNN_BOX(&fused_cnn::bn_add_relu_fwd));
  m.impl("bn_add_relu_bwd", FUSED_CNN_BOX(&fused_cnn::bn_add_relu_bwd));
}
