// batch_norm's backward on CUDA, in two passes: the sums per channel, which are the parameters' gradients, added up
// without atomics (cuda/column_reduction.cuh); then the inputs' gradients. ReLU's mask is computed again from the
// inputs, or read where the forward kept it.
#include "batch_norm/cuda_vectors.cuh"

namespace fused_cnn {
namespace {

// What both kernels do with a thread's rows: the vectors of grad_out and of the normalised inputs, the inputs'
// per-channel vectors, and with these the gradient under ReLU's mask, as the forward computed it.
template <typename T, bool kAligned, Residual kResidual>
struct GradientRows {
  using C = compute_t<T>;
  static constexpr int kInputs = kResidual == Residual::normalized ? 2 : 1, kRows = kInFlight<T, 1 + kInputs>;
  const ThreadTile<BnBranch>& tile;
  const BnBranch& branch;
  BnVectors<T> vectors[kInputs];
  Vec8<T> g[kRows], x[kInputs][kRows];

  __device__ explicit GradientRows(const ThreadTile<BnBranch>& tile) : tile(tile), branch(*tile.branch) {
#pragma unroll
    for (int k = 0; k < kInputs; ++k) vectors[k] = BnVectors<T>::template load<kAligned>(branch.in[k], tile);
  }

  __device__ void load(int u, int64_t row) {
    g[u] = load_vec8<kAligned>(branch.y.at<const T>(row) + tile.channel, tile.n);
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      x[k][u] = load_vec8<kAligned>(branch.in[k].x.at<const T>(row) + tile.channel, tile.n);
    }
  }

  __device__ C masked(int u, int j, bool use_relu) const {
    const C grad = to_compute(g[u].v[j]);
    if (!use_relu) return grad;
    C y = vectors[0].normalize(x[0][u].v[j], j);
    if constexpr (kInputs == 2) y += vectors[1].normalize(x[1][u].v[j], j);
    return relu_grad(grad, y);
  }
};

// partial[chunk] = for all `total` channels the sums of the masked gradient g, then of g (x - mean), then, with a
// normalised residual, of g (residual - its mean). A plain residual's gradient is g: it is written on the way.
// Grid (channel tiles, row chunks), 256 threads. Reads grad_out and the inputs (of a plain residual the mask) once:
// memory's bandwidth is the limit. ResNet-50's (batch 256, bfloat16) moved at 0.73 of the copy's without a residual,
// 0.87 with a plain one, 0.74 with a normalised one, on an H200 (2026-11-26).
template <typename T, bool kAligned, Residual kResidual>
__global__ void __launch_bounds__(kColumnThreads, kBlocksPerSm<T, kAligned>)
    bn_reduce_kernel(const __grid_constant__ BranchList<BnBranch> list, RowChunks chunks, bool use_relu,
                     const uint8_t* __restrict__ mask, compute_t<T>* __restrict__ partial, int64_t total) {
  using C = compute_t<T>;
  using Loaded = GradientRows<T, kAligned, kResidual>;
  constexpr int kInputs = Loaded::kInputs;
  const ThreadTile tile(list, chunks);
  const BnBranch& branch = *tile.branch;
  const int64_t mask_pitch = mask_bytes(branch.channels);
  Loaded rows(tile);
  C sum[kVec] = {}, sum_x[kInputs][kVec] = {};
  uint32_t byte[Loaded::kRows];
  for_rows<Loaded::kRows>(
      tile,
      [&](int u, int64_t row) {
        rows.load(u, row);
        if constexpr (kResidual == Residual::plain) byte[u] = mask[row * mask_pitch + tile.channel / 8];
      },
      [&](int u, int64_t row) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          C v;
          if constexpr (kResidual == Residual::plain) {
            v = byte[u] >> j & 1 ? to_compute(rows.g[u].v[j]) : C(0);
            from_compute(v, &rows.g[u].v[j]);
          } else {
            v = rows.masked(u, j, use_relu);
          }
          sum[j] += v;
#pragma unroll
          for (int k = 0; k < kInputs; ++k)
            sum_x[k][j] += v * (to_compute(rows.x[k][u].v[j]) - rows.vectors[k].mean.v[j]);
        }
        if constexpr (kResidual == Residual::plain) {
          store_vec8<kAligned>(static_cast<T*>(branch.grad[1]) + row * branch.channels + tile.channel, rows.g[u],
                               tile.n);
        }
      });
  C* to = partial + blockIdx.y * (kInputs + 1) * total + branch.first;
  block_reduce_columns(sum, tile, [&](int64_t channel, C s) { to[channel] = s; });
#pragma unroll
  for (int k = 0; k < kInputs; ++k) {
    block_reduce_columns(sum_x[k], tile, [&](int64_t channel, C s) { to[(k + 1) * total + channel] = s; });
  }
}

// From the chunks' sums for `total` channels and `inputs` normalised inputs: the parameters' gradients, and math.h's
// offset and slope for the inputs' gradients, input after input. Grid (channels / 32), 512 threads. It reads little,
// and waits for it: 7 microseconds each in ResNet-50 on an H200 (2026-11-26).
template <typename C>
__global__ void __launch_bounds__(kReduceThreads)
    bn_finish_sums_kernel(const C* __restrict__ partial, int64_t chunks, int64_t rows, int64_t total, int inputs,
                          const C* __restrict__ rstd, C* __restrict__ grad_weight, C* __restrict__ grad_bias,
                          C* __restrict__ offset, C* __restrict__ slope) {
  const int64_t channel = reduce_channel();
  const bool inside = channel < total;
  const auto sum_of = [&](int k) {
    return reduce_chunks(chunks, inside, [&](int64_t i) { return partial[(i * (inputs + 1) + k) * total + channel]; });
  };
  const double n = static_cast<double>(rows);
  double sum = 0;
  for (int k = 0; k <= inputs; ++k) {
    const double sum_k = sum_of(k);
    if (k == 0) sum = sum_k;
    if (k == 0 || !inside || threadIdx.x >= 32) continue;
    const int64_t to = (k - 1) * total + channel;
    const double r = rstd[to];
    grad_weight[to] = static_cast<C>(sum_k * r);
    grad_bias[to] = static_cast<C>(sum);
    offset[to] = static_cast<C>(sum / n);
    slope[to] = static_cast<C>(sum_k * r * r / n);
  }
}

// grad of x and, with a normalised residual, of that, from y, the gradient of the result (masked already, unless
// use_relu).
// Grid (channel tiles, row chunks), 256 threads. Reads y and the inputs and writes their gradients once: the copy's
// bandwidth is the limit. ResNet-50's (batch 256, bfloat16) moved at 0.84 of it, and at 0.77 with a normalised
// residual, on an H200 (2026-11-26).
template <typename T, bool kAligned, Residual kResidual>
__global__ void __launch_bounds__(kColumnThreads, kBlocksPerSm<T, kAligned>)
    bn_grad_input_kernel(const __grid_constant__ BranchList<BnBranch> list, RowChunks chunks, bool use_relu,
                         const compute_t<T>* __restrict__ offset, const compute_t<T>* __restrict__ slope,
                         int64_t total) {
  using C = compute_t<T>;
  using Loaded = GradientRows<T, kAligned, kResidual>;
  constexpr int kInputs = Loaded::kInputs;
  const ThreadTile tile(list, chunks);
  const BnBranch& branch = *tile.branch;
  Loaded rows(tile);
  Vec8<C> offsets[kInputs], slopes[kInputs];
#pragma unroll
  for (int k = 0; k < kInputs; ++k) {
    const int64_t from = k * total + branch.first + tile.channel;
    offsets[k] = load_vec8<kAligned>(offset + from, tile.n);
    slopes[k] = load_vec8<kAligned>(slope + from, tile.n);
  }
  for_rows<Loaded::kRows>(
      tile, [&](int u, int64_t row) { rows.load(u, row); },
      [&](int u, int64_t row) {
        C v[kVec];
#pragma unroll
        for (int j = 0; j < kVec; ++j) v[j] = rows.masked(u, j, use_relu);
#pragma unroll
        for (int k = 0; k < kInputs; ++k) {
          Vec8<T>& x = rows.x[k][u];
          const BnVectors<T>& of = rows.vectors[k];
#pragma unroll
          for (int j = 0; j < kVec; ++j) {
            const C scale = of.scale.v[j];
            from_compute(branch.training[k] ? batch_norm::grad_input(v[j], to_compute(x.v[j]), of.mean.v[j], scale,
                                                                     offsets[k].v[j], slopes[k].v[j])
                                            : v[j] * scale,
                         &x.v[j]);
          }
          store_vec8<kAligned>(static_cast<T*>(branch.grad[k]) + row * branch.channels + tile.channel, x, tile.n);
        }
      });
}

// Both passes; the gradients of weight and bias.
template <typename T, Residual kResidual>
std::tuple<Tensor, Tensor> backward(const NormalizedInputs& in, std::vector<BnBranch> branches, bool relu,
                                    const uint8_t* mask) {
  using C = compute_t<T>;
  constexpr int kInputs = GradientRows<T, true, kResidual>::kInputs;
  const Launch launch(in.mean);
  const int64_t total = in.total / kInputs;
  const RowChunks chunks = RowChunks::of(in.rows, branches);
  const Tensor partial = in.empty_like_mean(chunks.count * (kInputs + 1) * total);
  const auto vector = [&] { return in.empty_like_mean(in.total); };
  const Tensor grad_weight = vector(), grad_bias = vector(), offset = vector(), slope = vector();

  const bool aligned = aligned16<T>(branches);
  launch_columns(launch, "bn_reduce_kernel",
                 aligned ? bn_reduce_kernel<T, true, kResidual> : bn_reduce_kernel<T, false, kResidual>, branches,
                 chunks, relu, mask, data_of<C>(partial), total);
  launch_reduce(launch, "bn_finish_sums_kernel", bn_finish_sums_kernel<C>, total, data_of<C>(partial), chunks.count,
                in.rows, total, kInputs, data_of<C>(in.rstd), data_of<C>(grad_weight), data_of<C>(grad_bias),
                data_of<C>(offset), data_of<C>(slope));

  // A plain residual has its gradient already, and that is x's under ReLU's mask.
  constexpr bool kPlain = kResidual == Residual::plain;
  constexpr Residual kLeft = kPlain ? Residual::none : kResidual;
  if (kPlain) branches[0].y = {branches[0].grad[1], total};
  launch_columns(launch, "bn_grad_input_kernel",
                 aligned ? bn_grad_input_kernel<T, true, kLeft> : bn_grad_input_kernel<T, false, kLeft>, branches,
                 chunks, relu && !kPlain, data_of<C>(offset), data_of<C>(slope), total);
  return {grad_weight, grad_bias};
}

}  // namespace

std::tuple<Tensor, Tensor> bn_backward(const NormalizedInputs& in, std::vector<BnBranch> branches, Residual residual,
                                       bool relu, const uint8_t* mask) {
  return with_type(in.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = residual == Residual::none    ? backward<T, Residual::none>
                     : residual == Residual::plain ? backward<T, Residual::plain>
                                                   : backward<T, Residual::normalized>;
    return run(in, branches, relu, mask);
  });
}

}  // namespace fused_cnn
