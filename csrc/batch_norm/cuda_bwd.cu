// fused_cnn::bn_relu_concat_bwd and bn_add_relu_bwd on CUDA, in two passes: the sums per channel, which are the
// parameters' gradients, added up without atomics (cuda/column_reduction.cuh); then the inputs' gradients. ReLU's mask
// is computed again from the inputs, or read where the forward kept it.
#include <optional>
#include <tuple>
#include "batch_norm/cuda_inputs.cuh"

namespace fused_cnn {
namespace {

// What both kernels do with a thread's rows: the octets of grad_out and of the normalised inputs, the inputs' vectors,
// and with these the gradient under ReLU's mask, as the forward computed it.
template <typename T, bool kVectors, Residual kResidual>
struct GradientRows {
  using C = compute_t<T>;
  static constexpr int kInputs = kResidual == Residual::normalized ? 2 : 1, kRows = kInFlight<T, 1 + kInputs>;
  const BnBranch<T>& branch;
  const Place& place;
  BnVectors<T> vectors[kInputs];
  Octet<T> g[kRows], x[kInputs][kRows];

  __device__ GradientRows(const BnBranch<T>& branch, const Place& place) : branch(branch), place(place) {
#pragma unroll
    for (int k = 0; k < kInputs; ++k) vectors[k] = BnVectors<T>::template load<kVectors>(branch.in[k], place);
  }

  __device__ void load(int u, int64_t row) {
    g[u] = load_octet<kVectors>(branch.y + row * branch.y_pitch + place.channel, place.n);
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      x[k][u] = load_octet<kVectors>(branch.in[k].x + row * branch.in[k].pitch + place.channel, place.n);
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
template <typename T, bool kVectors, Residual kResidual>
__global__ void __launch_bounds__(kColumnThreads, kBlocks<T, kVectors>)
    bn_reduce_kernel(const __grid_constant__ BranchList<BnBranch<T>> list, bool use_relu,
                     const uint8_t* __restrict__ bits, Chunks chunks, compute_t<T>* __restrict__ partial,
                     int64_t total) {
  using C = compute_t<T>;
  using Rows = GradientRows<T, kVectors, kResidual>;
  constexpr int kInputs = Rows::kInputs;
  const BranchPlace place(list, chunks);
  const BnBranch<T>& branch = place.branch;
  const int64_t mask_pitch = mask_bytes(branch.channels);
  Rows rows(branch, place);
  C sum[kOctet] = {}, sum_x[kInputs][kOctet] = {};
  uint32_t byte[Rows::kRows];
  for_rows<Rows::kRows>(
      place,
      [&](int u, int64_t row) {
        rows.load(u, row);
        if constexpr (kResidual == Residual::plain) byte[u] = bits[row * mask_pitch + place.channel / 8];
      },
      [&](int u, int64_t row) {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
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
          store_octet<kVectors>(branch.grad[1] + row * branch.channels + place.channel, rows.g[u], place.n);
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
  using Rows = GradientRows<T, kVectors, kResidual>;
  constexpr int kInputs = Rows::kInputs;
  const BranchPlace place(list, chunks);
  const BnBranch<T>& branch = place.branch;
  Rows rows(branch, place);
  Octet<C> offsets[kInputs], slopes[kInputs];
#pragma unroll
  for (int k = 0; k < kInputs; ++k) {
    const int64_t from = k * total + branch.first + place.channel;
    offsets[k] = load_octet<kVectors>(offset + from, place.n);
    slopes[k] = load_octet<kVectors>(slope + from, place.n);
  }
  for_rows<Rows::kRows>(
      place, [&](int u, int64_t row) { rows.load(u, row); },
      [&](int u, int64_t row) {
        C v[kOctet];
#pragma unroll
        for (int j = 0; j < kOctet; ++j) v[j] = rows.masked(u, j, use_relu);
#pragma unroll
        for (int k = 0; k < kInputs; ++k) {
          Octet<T>& x = rows.x[k][u];
          const BnVectors<T>& of = rows.vectors[k];
#pragma unroll
          for (int j = 0; j < kOctet; ++j) {
            const C scale = of.scale.v[j];
            from_compute(branch.training[k] ? batch_norm::grad_input(v[j], to_compute(x.v[j]), of.mean.v[j], scale,
                                                                     offsets[k].v[j], slopes[k].v[j])
                                            : v[j] * scale,
                         &x.v[j]);
          }
          store_octet<kVectors>(branch.grad[k] + row * branch.channels + place.channel, x, place.n);
        }
      });
}

// Both passes over branches whose y is grad_out and whose grad are the results.
template <typename T, Residual kResidual>
void backward(const BnInputs& in, std::vector<BnBranch<T>> branches, bool relu, const uint8_t* bits,
              const Tensor& grad_weight, const Tensor& grad_bias) {
  using C = compute_t<T>;
  constexpr int kInputs = GradientRows<T, true, kResidual>::kInputs;
  const int64_t total = in.total / kInputs;
  const Chunks chunks = Chunks::of(in.rows, branches);
  const auto vector = [&](int64_t size) { return empty_vector(grad_weight, size, in.vector_type); };
  const auto of = [](const Tensor& t) { return static_cast<C*>(t.data_ptr()); };
  const Tensor partial = vector(chunks.count * (kInputs + 1) * total), offset = vector(in.total),
               slope = vector(in.total);

  const bool vectors = on_vectors(branches);
  const auto reduce = vectors ? bn_reduce_kernel<T, true, kResidual> : bn_reduce_kernel<T, false, kResidual>;
  in_lists(branches, [&](const BranchList<BnBranch<T>>& list, int64_t strips) {
    in.launch.run("bn_reduce_kernel", reduce, strips, chunks.count, kColumnThreads, list, relu, bits, chunks,
                  of(partial), total);
  });
  in.launch.run("bn_finish_sums_kernel", bn_finish_sums_kernel<C>, ceil_div<int64_t>(total, 32), 1, kChunkThreads,
                of(partial), chunks.count, in.rows, total, kInputs, static_cast<const C*>(in.rstd()), of(grad_weight),
                of(grad_bias), of(offset), of(slope));

  constexpr bool kPlain = kResidual == Residual::plain;
  constexpr Residual kLeft = kPlain ? Residual::none : kResidual;  // the plain residual has its gradient already
  if (kPlain) branches[0].y = branches[0].grad[1], branches[0].y_pitch = branches[0].channels;
  const auto grad = vectors ? bn_grad_input_kernel<T, true, kLeft> : bn_grad_input_kernel<T, false, kLeft>;
  in_lists(branches, [&](const BranchList<BnBranch<T>>& list, int64_t strips) {
    in.launch.run("bn_grad_input_kernel", grad, strips, chunks.count, kColumnThreads, list, relu && !kPlain, chunks,
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
  const BnInputs in(op, xs, mean, rstd, weights, biases);
  check_gradient(op, grad_out, xs[0], in.total, training, xs.size());
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
    backward<T, Residual::none>(in, branches, relu, nullptr, grad_weight, grad_bias);
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
  const std::vector<Tensor> xs = normalized_inputs(op, x, residual, weights.size());
  const BnInputs in(op, xs, mean, rstd, weights, biases);
  check_gradient(op, grad_out, x, x.size(1), training, xs.size());
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
    run(in, branches, true, plain ? static_cast<const uint8_t*>(kept.data_ptr()) : nullptr, grad_weight, grad_bias);
  });
  return {grad_x.finish(), grad_residual.finish(), grad_weight, grad_bias};
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("bn_relu_concat_bwd", FUSED_CNN_BOX(&fused_cnn::bn_relu_concat_bwd));
  m.impl("bn_add_relu_bwd", FUSED_CNN_BOX(&fused_cnn::bn_add_relu_bwd));
}
