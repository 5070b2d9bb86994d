// 1x1 convolutions with their epilogue, and their gradients, on CUDA (pointwise.cuh). Backward is one pass for ReLU's
// mask and the bias's gradient, the product with the weight for grad_x, and for the weight's own gradient products of
// chunks of the rows, added up in order.
#pragma once
#include <tuple>
#include "cuda/gemm/pointwise.cuh"
#include "cuda/drelu_bgrad.cuh"

namespace fused_cnn {

// Every stride-th row and column of x: the pixels that a 1x1 convolution reads.
inline Tensor every(const Tensor& x, const Ints& stride) {
  using torch::stable::detail::from;
  Tensor view = x;
  for (int64_t axis = 0; axis < 2; ++axis) {
    if (stride[axis] == 1) continue;
    std::array<StableIValue, 5> stack{from(view), from(axis + 2), from(std::optional<int64_t>()),
                                      from(std::optional<int64_t>()), from(stride[axis])};
    call_operator("aten::slice", "Tensor", stack);
    view = torch::stable::detail::to<Tensor>(stack[0]);
  }
  return view;
}

inline Tensor pointwise_conv_forward(const char* op, const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                     const std::optional<Tensor>& residual, const Ints& stride, bool relu) {
  check_conv(op, x, weight, bias, residual, pointwise_params(stride));
  const Launch launch(x);
  const Tensor read = every(x, stride);
  const int64_t channels = weight.size(0);
  const RowResult out(read, channels, result_format(x));
  std::optional<RowView> addend;
  if (residual) addend = rows_of(*residual);
  if (bias) bias = torch::stable::contiguous(*bias);
  pointwise(launch, read, rows_of(read), torch::stable::contiguous(weight), bias, addend ? &*addend : nullptr, relu,
            {{out.data, channels, static_cast<int>(channels)}});
  return out.finish();
}

constexpr int kSumThreads = 256;

// out = the sum of `count` arrays of `size` octets, one behind the other, in order.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    add_up_arrays_kernel(const float* __restrict__ arrays, int count, int64_t size, T* __restrict__ out) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x) * kOctet;
  if (at >= size * kOctet) return;
  Octet<float> sum = load_octet<true>(arrays + at, kOctet);
#pragma unroll 4
  for (int i = 1; i < count; ++i) {
    const Octet<float> more = load_octet<true>(arrays + i * size * kOctet + at, kOctet);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) sum.v[j] += more.v[j];
  }
  Octet<T> result;
#pragma unroll
  for (int j = 0; j < kOctet; ++j) from_compute(sum.v[j], &result.v[j]);
  store_octet<true>(out + at, result, kOctet);
}

// grad^T x, (out, C, 1, 1), of grad and x as rows: the rows are cut into chunks, as many as fill a large chip, whose
// products are added up in order. What tensor cores do not take is the library's.
inline Tensor weight_gradient(const Launch& launch, const RowView& any_grad, const RowView& any_in,
                              const Tensor& weight) {
  const DType dtype = dtype_of("weight_gradient", "weight", weight);
  const int64_t rows = row_count(any_grad.tensor), outputs = weight.size(0), inputs = weight.size(1);
  const GemmKernels kernels(weight.get_device_index());
  if (!kernels || !gemm_takes(dtype, rows, inputs, outputs)) {
    return std::get<1>(
        library_conv_backward(any_grad.tensor, any_in.tensor, weight, pointwise_params({1, 1}), false, true));
  }
  const RowView grad = on_16_bytes(any_grad), in = on_16_bytes(any_in);
  constexpr int64_t kBlocks = 256, kLeast = 512;
  const int64_t tiles = ceil_div<int64_t>(outputs, 128) * ceil_div<int64_t>(inputs, 128);
  const int64_t size = std::max(kLeast, ceil_div(rows, ceil_div(kBlocks, tiles)) + 63 & ~int64_t{63});
  const int64_t whole = rows / size, rest = rows % size, count = whole + (rest > 0);
  const Tensor products = empty_vector(weight, count * outputs * inputs, ScalarType::Float);
  Gemm gemm{GemmKind::sums,
            dtype,
            {grad.data, grad.stride},
            {in.data, in.stride},
            size * grad.stride,
            size * in.stride,
            static_cast<int>(outputs),
            static_cast<int>(inputs),
            static_cast<int>(size),
            static_cast<int>(whole),
            {}};
  gemm.epilogue.slices = 1, gemm.epilogue.batch_stride = outputs * inputs;
  gemm.epilogue.slice[0] = {products.data_ptr(), inputs, static_cast<int>(inputs)};
  if (whole > 0) kernels.run(launch, gemm);
  if (rest > 0) {
    const auto behind = [&](const RowView& view) {
      return GemmMatrix{static_cast<const char*>(view.data) + whole * size * view.stride * 2, view.stride};
    };
    gemm.a = behind(grad), gemm.b = behind(in), gemm.k = static_cast<int>(rest), gemm.batch = 1;
    gemm.epilogue.slice[0].data = static_cast<float*>(products.data_ptr()) + whole * outputs * inputs;
    kernels.run(launch, gemm);
  }
  Tensor grad_weight = empty_like_4d(weight, MemoryFormat::Contiguous);
  const int64_t octets = outputs * inputs / kOctet;
  const auto add_up = [&](auto element) {
    using T = decltype(element);
    launch.run("add_up_arrays_kernel", add_up_arrays_kernel<T>, ceil_div<int64_t>(octets, kSumThreads), 1, kSumThreads,
               static_cast<const float*>(products.data_ptr()), static_cast<int>(count), octets,
               static_cast<T*>(grad_weight.data_ptr()));
  };
  dtype == DType::f16 ? add_up(f16_t{}) : add_up(bf16_t{});
  return grad_weight;
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> pointwise_conv_backward(const char* op, const Tensor& grad_out,
                                                                          const std::optional<Tensor>& out,
                                                                          const Tensor& x, const Tensor& weight,
                                                                          const Ints& stride, bool needs_x,
                                                                          bool needs_weight, bool needs_bias) {
  check_conv(op, x, weight, std::nullopt, grad_out, pointwise_params(stride));
  if (out) check_like(op, "grad_out", grad_out, "out", *out);
  const Launch launch(x);
  const MaskedGradient masked(launch, grad_out, out, needs_bias);
  const RowView& grad = masked.rows;
  const Tensor read = every(x, stride);
  Tensor grad_x = nothing(grad_out), grad_weight = nothing(grad_out);
  if (needs_x) {
    const RowResult at_read(read, x.size(1), MemoryFormat::ChannelsLast);
    if (weight.size(0) > 0) {
      pointwise(launch, grad.tensor, grad, torch::stable::contiguous(torch::stable::transpose(weight, 0, 1)),
                std::nullopt, nullptr, false, {{at_read.data, x.size(1), static_cast<int>(x.size(1))}});
    } else {
      Tensor zero = at_read.tensor;
      torch::stable::zero_(zero);
    }
    if (stride[0] == 1 && stride[1] == 1) {
      grad_x = dense(at_read.finish(), result_format(x));
    } else {
      grad_x = empty_like_4d(x, result_format(x));
      torch::stable::zero_(grad_x);
      Tensor view = every(grad_x, stride);
      torch::stable::copy_(view, at_read.tensor);
    }
  }
  if (needs_weight) grad_weight = dense(weight_gradient(launch, grad, rows_of(read), weight), result_format(weight));
  return {grad_x, grad_weight, masked.bias, masked.residual(grad_out)};
}

}  // namespace fused_cnn
