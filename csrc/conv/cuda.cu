// fused_cnn::conv_bias_relu_fwd and _bwd on CUDA. Forward is a product of our own where there is one
// (cuda/gemm/convolve.cuh), and so are a 1x1 convolution's gradients, its weight's split along K; other gradients are
// cuDNN's, behind one pass for ReLU's mask and the bias's gradient.
#include "conv/backward.h"
#include "cuda/gemm/convolve.cuh"

namespace fused_cnn {
namespace {

Tensor conv_bias_relu_fwd(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                          std::optional<Tensor> residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
                          bool relu) {
  const ConvParams params{stride, padding, dilation, groups};
  check_conv("conv_bias_relu_fwd", x, weight, bias, residual, params);
  const Ints kernel{weight.size(2), weight.size(3)};
  const std::array<int64_t, 2> size{conv_out_size(x.size(2), kernel, params, 0),
                                    conv_out_size(x.size(3), kernel, params, 1)};
  if (bias) bias = torch::stable::contiguous(*bias);
  const Tile* tile = tile_of(x, weight, params, residual.has_value(), relu, size, /*own=*/true);
  const MemoryFormat format = result_format(x);
  if (tile && tile->kind == TileKind::library_fused) {
    return dense(library_fused(x, weight, bias, params), format);
  }
  const bool alone = !bias && !residual && !relu;
  if (alone && (!tile || tile->kind == TileKind::library)) {
    return dense(aten_convolution(x, weight, std::nullopt, params), format);
  }
  const RowResult out(x, weight.size(0), size[0], size[1], format);
  convolve(x, weight, bias, rows_of(residual), params, relu, size, {out, static_cast<int>(weight.size(0))}, tile);
  return out.finish();
}

constexpr int kSplitKThreads = 256;

// out = the sum of `count` arrays of `size` vectors, one behind the other, in order: the second stage of split-K.
template <typename T>
__global__ void __launch_bounds__(kSplitKThreads)
    split_k_reduce_kernel(const float* __restrict__ arrays, int count, int64_t size, T* __restrict__ out) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kSplitKThreads + threadIdx.x) * kVec;
  if (at >= size * kVec) return;
  Vec8<float> sum = load_vec8<true>(arrays + at, kVec);
#pragma unroll 4
  for (int i = 1; i < count; ++i) {
    const Vec8<float> more = load_vec8<true>(arrays + i * size * kVec + at, kVec);
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum.v[j] += more.v[j];
  }
  Vec8<T> result;
#pragma unroll
  for (int j = 0; j < kVec; ++j) from_compute(sum.v[j], &result.v[j]);
  store_vec8<true>(out + at, result, kVec);
}

// grad^T x, (out, C, 1, 1), of grad and x as rows, split-K: the rows are cut into parts, as many as fill a large chip,
// whose products are added up in order. What tensor cores do not take is cuDNN's.
Tensor pointwise_wgrad(const RowView& any_grad, const RowView& any_in, const Tensor& weight) {
  const DType dtype = dtype_of("pointwise_wgrad", "weight", weight);
  const int64_t rows = row_count(any_grad.tensor), outputs = weight.size(0), inputs = weight.size(1);
  const GemmKernels kernels(weight.get_device_index());
  if (!kernels || !gemm_supports(dtype, rows, inputs, outputs)) {
    return std::get<1>(aten_convolution_backward(any_grad.tensor, any_in.tensor, weight, same_padding(1), false, true));
  }
  const Launch launch(weight);
  const RowView grad = on_16_bytes(any_grad), in = on_16_bytes(any_in);
  constexpr int64_t kBlocks = 256, kLeast = 512;
  const int64_t tiles = ceil_div<int64_t>(outputs, 128) * ceil_div<int64_t>(inputs, 128);
  const int64_t size = std::max(kLeast, ceil_div(rows, ceil_div(kBlocks, tiles)) + 63 & ~int64_t{63});
  const int64_t whole = rows / size, rest = rows % size, count = whole + (rest > 0);
  const Tensor products = empty_vector(weight, count * outputs * inputs, ScalarType::Float);
  // The products of so many parts from `part` on, of `length` rows each.
  const auto run = [&](int64_t part, int64_t parts, int64_t length) {
    if (parts == 0 || length == 0) return;
    const auto from = [&](const RowView& view) { return Rows{view.at<uint16_t>(part * size), view.pitch}; };
    Gemm gemm{.kind = GemmKind::wgrad,
              .tile = nullptr,
              .dtype = dtype,
              .a = from(grad),
              .b = from(in),
              .a_batch_stride = size * grad.pitch,
              .b_batch_stride = size * in.pitch,
              .m = static_cast<int>(outputs),
              .n = static_cast<int>(inputs),
              .k = static_cast<int>(length),
              .batch = static_cast<int>(parts),
              .epilogue = {.slices = 1, .batch_stride = outputs * inputs}};
    gemm.epilogue.slice[0] = {{data_of<float>(products) + part * outputs * inputs, inputs}, static_cast<int>(inputs)};
    kernels.run(launch, gemm);
  };
  run(0, whole, size);
  run(whole, 1, rest);
  Tensor grad_weight = empty_like_4d(weight, MemoryFormat::Contiguous);
  const int64_t vectors = outputs * inputs / kVec;
  const auto reduce = [&](auto element) {
    using T = decltype(element);
    launch.run("split_k_reduce_kernel", split_k_reduce_kernel<T>, ceil_div<int64_t>(vectors, kSplitKThreads), 1,
               kSplitKThreads, data_of<float>(products), static_cast<int>(count), vectors, data_of<T>(grad_weight));
  };
  dtype == DType::f16 ? reduce(f16_t{}) : reduce(bf16_t{});
  return grad_weight;
}

// grad weight at the pixels of x that the convolution read, zero elsewhere.
Tensor pointwise_dgrad(const RowView& grad, const Tensor& x, const Tensor& read, const Tensor& weight,
                       const Ints& stride) {
  const RowResult at_read(read, x.size(1), MemoryFormat::ChannelsLast);
  if (weight.size(0) > 0) {
    pointwise(grad.tensor, grad, {torch::stable::contiguous(torch::stable::transpose(weight, 0, 1))}, /*biases=*/{},
              /*residual=*/{}, /*relu=*/false, {{at_read, static_cast<int>(x.size(1))}});
  } else {
    Tensor zero = at_read.tensor;
    torch::stable::zero_(zero);
  }
  if (stride == Ints{1, 1}) return dense(at_read.finish(), result_format(x));
  Tensor grad_x = empty_like_4d(x, result_format(x));
  torch::stable::zero_(grad_x);
  Tensor view = strided_slice(grad_x, stride);
  torch::stable::copy_(view, at_read.tensor);
  return grad_x;
}

}  // namespace

std::tuple<Tensor, Tensor> convolution_backward(const RowView& grad, const Tensor& x, const Tensor& weight,
                                                const ConvParams& params, bool needs_x, bool needs_weight) {
  if (!is_pointwise(weight, params)) {
    return aten_convolution_backward(grad.tensor, x, weight, params, needs_x, needs_weight);
  }
  const Tensor read = strided_slice(x, params.stride);
  return {needs_x ? pointwise_dgrad(grad, x, read, weight, params.stride) : Tensor(),
          needs_weight ? pointwise_wgrad(grad, rows_of(read), weight) : Tensor()};
}

}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("conv_bias_relu_fwd", FUSED_CNN_BOX(&fused_cnn::conv_bias_relu_fwd));
  m.impl("conv_bias_relu_bwd", FUSED_CNN_BOX(&fused_cnn::conv_bias_relu_bwd));
}
