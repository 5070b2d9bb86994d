// fused_cnn::bn_relu_concat_bwd and bn_add_relu_bwd on CUDA, in two passes: the sums per channel, which are the
// parameters' gradients, added up without atomics (common/columns.cuh); then the inputs' gradients. ReLU's mask is
// computed again from the inputs, or read where the forward kept it.
#include <optional>
#include <tuple>
#include "batch_norm/cuda_inputs.cuh"

namespace fused_cnn {
namespace {

constexpr int inputs_of(Residual residual) {
  return residual == Residual::normalized ? 2 : 1;
}

// The vectors of the normalised inputs, and the gradient under ReLU's mask, which they give again.
template <typename T, Residual kResidual>
struct MaskedGradient {
  using C = compute_t<T>;
  BnVectors<T> v, w;  // w: with a normalised residual

  template <bool kVectors>
  __device__ void load(const BnBranch<T>& branch, const Place& place) {
    v = BnVectors<T>::template load<kVectors>(branch.in[0], place);
    if constexpr (kResidual == Residual::normalized) {
      w = BnVectors<T>::template load<kVectors>(branch.in[1], place);
    }
  }

  __device__ const BnVectors<T>& of(int input) const { return input == 0 ? v : w; }

  // grad where ReLU let the output through, as the forward computed it.
  __device__ C recompute(C grad, T x, T residual, int j) const {
    C y = v.normalize(x, j);
    if constexpr (kResidual == Residual::normalized) y += w.normalize(residual, j);
    return relu_grad(grad, y);
  }
};

// partial[chunk] = for all `total` channels the sums of the masked gradient g, then of g (x - mean), then, with a
// normalised residual, of g (residual - its mean). A plain residual's gradient is g: it is written on the way.
template <typename T, bool kVectors, Residual kResidual>
__global__ void __launch_bounds__(kColumnThreads, kBlocks<T, kVectors>)
    bn_reduce_kernel(const __grid_constant__ BranchList<BnBranch<T>> list, bool use_relu,
                     const uint8_t* __restrict__ bits, Chunks chunks, compute_t<T>* __restrict__ partial,
                     int64_t total) {
  using C = compute_t<T>;
  constexpr int kInputs = inputs_of(kResidual), kRows = kInFlight<T, 1 + kInputs>;
  const BranchPlace place(list, chunks);
  const BnBranch<T>& branch = place.branch;
  const int64_t mask_pitch = (branch.channels + 7) / 8;
  MaskedGradient<T, kResidual> masked;
  masked.template load<kVectors>(branch, place);
  C sum[kOctet] = {}, sum_x[kInputs][kOctet] = {};
  Octet<T> g[kRows], x[kInputs][kRows];
  uint32_t byte[kRows];
  for_rows<kRows>(
      place,
      [&](int u, int64_t row) {
        g[u] = load_octet<kVectors>(branch.y + row * branch.y_pitch + place.channel, place.n);
#pragma unroll
        for (int k = 0; k < kInputs; ++k) {
          x[k][u] = load_octet<kVectors>(branch.in[k].x + row * branch.in[k].pitch + place.channel, place.n);
        }
        if constexpr (kResidual == Residual::plain) byte[u] = bits[row * mask_pitch + place.channel / 8];
      },
      [&](int u, int64_t row) {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          C v = to_compute(g[u].v[j]);
          if constexpr (kResidual == Residual::plain) {
            v = byte[u] >> j & 1 ? v : C(0);
            from_compute(v, &g[u].v[j]);
          } else if (use_relu) {
            v = masked.recompute(v, x[0][u].v[j], x[kInputs - 1][u].v[j], j);
          }
          sum[j] += v;
#pragma unroll
          for (int k = 0; k < kInputs; ++k) sum_x[k][j] += v * (to_compute(x[k][u].v[j]) - masked.of(k).mean.v[j]);
        }
        if constexpr (kResidual == Residual::plain) {
          store_octet<kVectors>(branch.grad[1] + row * branch.channels + place.channel, g[u], place.n);
        }
      });
  C* to = partial + blockIdx.y * (kInputs + 1) * total + branch.first;
  add_up_block(sum, place, [&](int64_t channel, C s) { to[channel] = s; });
#pragma unroll
  for (int k = 0; k < kInputs; ++k) {
    add_up_block(sum_x[k], place, [&](int64_t channel, C s) { to[(k + 1) * total + channel] = s; });
  }
}

// From the chunks' sums for `total` channels and `inputs` normalised inputs: the parameters' gradients, and math.h's
// offset and slope for the inputs' gradients, input after input.
template <typename C>
__global__ void __launch_bounds__(kChunkThreads)
    bn_finish_sums_kernel(const C* __restrict__ partial, int64_t chunks, int64_t rows, int64_t total, int inputs,
                          const C* __restrict__ rstd, C* __restrict__ grad_weight, C* __restrict__ grad_bias,
                          C* __restrict__ offset, C* __restrict__ slope) {
  const ChunkPlace place(chunks);
  const double n = static_cast<double>(rows);
  double of_gradient = 0;
  for (int k = 0; k <= inputs; ++k) {
    double sum = 0;
    if (place.channel < total) {
#pragma unroll 4
      for (int64_t i = place.chunk; i < place.end; ++i) sum += partial[(i * (inputs + 1) + k) * total + place.channel];
    }
    sum = add_up_parts(sum);
    if (k == 0) of_gradient = sum;
    if (k == 0 || !place.first || place.channel >= total) continue;
    const int64_t to = (k - 1) * total + place.channel;
    const double r = rstd[to];
    grad_weight[to] = static_cast<C>(sum * r);
    grad_bias[to] = static_cast<C>(of_gradient);
    offset[to] = static_cast<C>(of_gradient / n);
    slope[to] = static_cast<C>(sum * r * r / n);
  }
}

// grad of x and, with a normalised residual, of that, from y, the gradient of the result (masked already, unless
// use_relu).
template <typename T, bool kVectors, Residual kResidual>
__global__ void __launch_bounds__(kColumnThreads, kBlocks<T, kVectors>)
    bn_grad_input_kernel(const __grid_constant__ BranchList<BnBranch<T>> list, bool use_relu, Chunks chunks,
                         const compute_t<T>* __restrict__ offset, const compute_t<T>* __restrict__ slope,
                         int64_t total) {
  using C = compute_t<T>;
  constexpr int kInputs = inputs_of(kResidual), kRows = kInFlight<T, 1 + kInputs>;
  const BranchPlace place(list, chunks);
  const BnBranch<T>& branch = place.branch;
  MaskedGradient<T, kResidual> masked;
  masked.template load<kVectors>(branch, place);
  Octet<C> offsets[kInputs], slopes[kInputs];
#pragma unroll
  for (int k = 0; k < kInputs; ++k) {
    const int64_t from = k * total + branch.first + place.channel;
    offsets[k] = load_octet<kVectors>(offset + from, place.n);
    slopes[k] = load_octet<kVectors>(slope + from, place.n);
  }
  Octet<T> g[kRows], x[kInputs][kRows];
  for_rows<kRows>(
      place,
      [&](int u, int64_t row) {
        g[u] = load_octet<kVectors>(branch.y + row * branch.y_pitch + place.channel, place.n);
#pragma unroll
        for (int k = 0; k < kInputs; ++k) {
          x[k][u] = load_octet<kVectors>(branch.in[k].x + row * branch.in[k].pitch + place.channel, place.n);
        }
      },
      [&](int u, int64_t row) {
        C v[kOctet];
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          v[j] = to_compute(g[u].v[j]);
          if (use_relu) v[j] = masked.recompute(v[j], x[0][u].v[j], x[kInputs - 1][u].v[j], j);
        }
#pragma unroll
        for (int k = 0; k < kInputs; ++k) {
          const BnVectors<T>& of = masked.of(k);
#pragma unroll
          for (int j = 0; j < kOctet; ++j) {
            const C scale = of.scale.v[j];
            from_compute(branch.training[k] ? batch_norm::grad_input(v[j], to_compute(x[k][u].v[j]), of.mean.v[j],
                                                                     scale, offsets[k].v[j], slopes[k].v[j])
                                            : v[j] * scale,
                         &x[k][u].v[j]);
          }
          store_octet<kVectors>(branch.grad[k] + row * branch.channels + place.channel, x[k][u], place.n);
        }
      });
}

// Both passes over branches whose y is grad_out and whose grad are the results.
template <typename T, Residual kResidual>
void backward(const Launch& launch, const BnInputs& in, std::vector<BnBranch<T>> branches, bool relu,
              const uint8_t* bits, const Tensor& grad_weight, const Tensor& grad_bias) {
  using C = compute_t<T>;
  constexpr int kInputs = inputs_of(kResidual);
  const int64_t total = in.total / kInputs;
  const Chunks chunks = Chunks::of(in.rows, branches);
  const auto vector = [&](int64_t size) { return empty_vector(grad_weight, size, in.vector_type); };
  const auto of = [](const Tensor& t) { return static_cast<C*>(t.data_ptr()); };
  const Tensor partial = vector(chunks.count * (kInputs + 1) * total), offset = vector(in.total),
               slope = vector(in.total);

  const bool vectors = on_vectors(branches);
  const auto reduce = vectors ? bn_reduce_kernel<T, true, kResidual> : bn_reduce_kernel<T, false, kResidual>;
  in_lists(branches, [&](const BranchList<BnBranch<T>>& list, int64_t strips) {
    launch.run("bn_reduce_kernel", reduce, strips, chunks.count, kColumnThreads, list, relu, bits, chunks, of(partial),
               total);
  });
  launch.run("bn_finish_sums_kernel", bn_finish_sums_kernel<C>, ceil_div<int64_t>(total, 32), 1, kChunkThreads,
             of(partial), chunks.count, in.rows, total, kInputs, static_cast<const C*>(in.rstd()), of(grad_weight),
             of(grad_bias), of(offset), of(slope));

  constexpr bool kPlain = kResidual == Residual::plain;
  constexpr Residual kLeft = kPlain ? Residual::none : kResidual;  // the plain residual has its gradient already
  if (kPlain) branches[0].y = branches[0].grad[1], branches[0].y_pitch = branches[0].channels;
  const auto grad = vectors ? bn_grad_input_kernel<T, true, kLeft> : bn_grad_input_kernel<T, false, kLeft>;
  in_lists(branches, [&](const BranchList<BnBranch<T>>& list, int64_t strips) {
    launch.run("bn_grad_input_kernel", grad, strips, chunks.count, kColumnThreads, list, relu && !kPlain, chunks,
               of(offset), of(slope), total);
  });
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> bn_relu_concat_bwd(const Tensor& grad_out,
                                                                   const std::vector<Tensor>& xs, const Tensor& mean,
                                                                   const Tensor& rstd,
                                                                   const std::vector<Tensor>& weights,
                                                                   const std::vector<Tensor>& biases,
                                                                   const std::vector<bool>& training, bool relu) {
  const char* op = "bn_relu_concat_bwd";
  check_branches(op, xs);
  const Launch launch(xs[0]);
  const BnInputs in(op, xs, mean, rstd, weights, biases);
  check_training(op, training, xs.size());
  check_gradient(op, grad_out, xs[0], in.total);
  const RowView grad = rows_of(grad_out);
  Tensor grad_weight = empty_vector(xs[0], in.total, in.vector_type),
         grad_bias = empty_vector(xs[0], in.total, in.vector_type);
  std::vector<RowResult> results;
  for (const Tensor& x : xs) results.emplace_back(x, x.size(1), result_format(x));
  with_type(in.dtype, [&](auto element) {
    using T = decltype(element);
    std::vector<BnBranch<T>> branches = in.branches<T>();
    for (size_t i = 0; i < branches.size(); ++i) {
      branches[i].y = static_cast<T*>(grad.data) + branches[i].first, branches[i].y_pitch = grad.stride;
      branches[i].grad[0] = static_cast<T*>(results[i].data), branches[i].training[0] = training[i];
    }
    backward<T, Residual::none>(launch, in, branches, relu, nullptr, grad_weight, grad_bias);
  });
  std::vector<Tensor> grads;
  for (const RowResult& result : results) grads.push_back(result.finish());
  return {grads, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_relu_bwd(const Tensor& grad_out, const Tensor& x,
                                                           const std::optional<Tensor>& residual,
                                                           const std::optional<Tensor>& mask, const Tensor& mean,
                                                           const Tensor& rstd, const std::vector<Tensor>& weights,
                                                           const std::vector<Tensor>& biases,
                                                           const std::vector<bool>& training) {
  const char* op = "bn_add_relu_bwd";
  check_4d(op, "x", x);
  const std::vector<Tensor> xs = normalized_inputs(op, x, residual, weights.size());
  if (residual) check_like(op, "x", x, "residual", *residual);
  const Launch launch(x);
  const BnInputs in(op, xs, mean, rstd, weights, biases);
  check_training(op, training, xs.size());
  check_gradient(op, grad_out, x, x.size(1));
  const bool plain = xs.size() == 1;
  Tensor kept;
  if (plain) kept = checked_mask(op, mask, x);
  const RowView grad = rows_of(grad_out);
  const RowResult grad_x(x, x.size(1), result_format(x)), grad_residual(x, x.size(1), result_format(x));
  Tensor grad_weight = empty_vector(x, in.total, in.vector_type), grad_bias = empty_vector(x, in.total, in.vector_type);
  with_type(in.dtype, [&](auto element) {
    using T = decltype(element);
    std::vector<BnBranch<T>> branches = in.branch_with<T>(nullptr);
    BnBranch<T>& branch = branches[0];
    branch.y = static_cast<T*>(grad.data), branch.y_pitch = grad.stride;
    branch.grad[0] = static_cast<T*>(grad_x.data), branch.grad[1] = static_cast<T*>(grad_residual.data);
    branch.training[0] = training[0], branch.training[1] = training.back();
    const auto run = plain ? backward<T, Residual::plain> : backward<T, Residual::normalized>;
    run(launch, in, branches, true, plain ? static_cast<const uint8_t*>(kept.data_ptr()) : nullptr, grad_weight,
        grad_bias);
  });
  return {grad_x.finish(), grad_residual.finish(), grad_weight, grad_bias};
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("bn_relu_concat_bwd", TORCH_BOX(&fused_cnn::bn_relu_concat_bwd));
  m.impl("bn_add_relu_bwd", TORCH_BOX(&fused_cnn::bn_add_relu_bwd));
}
