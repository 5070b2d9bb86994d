// 1x1 convolutions over rows of channels: a product on tensor cores where the shape and the type allow one, else
// cuDNN's convolution and one pass for what follows it (bias_residual_relu.cuh). Float32 is cuDNN's, which follows
// PyTorch's own allow_tf32.
#pragma once
#include <climits>
#include "cuda/bias_residual_relu.cuh"
#include "cuda/gemm/gemm.h"
#include "shared/aten_conv.h"

namespace fused_cnn {

inline bool gemm_supports(DType dtype, int64_t rows, int64_t inputs, int64_t outputs) {
  return (dtype == DType::f16 || dtype == DType::bf16) && rows > 0 && inputs > 0 && outputs > 0 && inputs % 8 == 0 &&
         outputs % 8 == 0 && std::max({rows, inputs, outputs}) <= INT_MAX - 128;
}

// A contiguous tensor, copied where it does not lie on 16 bytes.
inline Tensor on_16_bytes(const Tensor& t) {
  return aligned16(t.data_ptr()) ? t : torch::stable::clone(t);
}

inline RowView on_16_bytes(const RowView& rows) {
  const Tensor& t = rows.tensor;
  // TMA does not load rows that overlap, as an expanded tensor's do.
  if (aligned16(rows, t.element_size()) && rows.pitch >= t.size(1)) return rows;
  Tensor copy = empty_result(t, t.size(1), t.size(2), t.size(3));
  torch::stable::copy_(copy, t);
  return {{copy.data_ptr(), t.size(1)}, copy};
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
  FUSED_CNN_CHECK(error == cudaSuccess, "no attribute ", static_cast<int>(attribute), " of CUDA device ", device, ": ",
                  cudaGetErrorString(error));
  return value;
}

// The kernels of this build for the device of a launch; null where it has none.
struct GemmKernels {
  cudaError_t (*f16)(const Gemm&, int, cudaStream_t) = nullptr;
  cudaError_t (*bf16)(const Gemm&, int, cudaStream_t) = nullptr;
  int multiprocessors;

  explicit GemmKernels(int device) : multiprocessors(device_attribute(cudaDevAttrMultiProcessorCount, device)) {
    const int major = device_attribute(cudaDevAttrComputeCapabilityMajor, device);
#if FUSED_CNN_GEMM_SM80
    if (major >= 8) {
      f16 = gemm_sm80_f16;
      bf16 = gemm_sm80_bf16;
    }
#endif
#if FUSED_CNN_GEMM_SM90A
    if (major == 9) {
      f16 = gemm_sm90a_f16;
      bf16 = gemm_sm90a_bf16;
    }
#endif
  }
  explicit operator bool() const { return f16 != nullptr; }

  void run(const Launch& launch, const Gemm& gemm) const {
    const auto kernel = gemm.dtype == DType::f16 ? f16 : bf16;
    const cudaError_t error = kernel(gemm, multiprocessors, launch.stream());
    if (error != cudaSuccess) cudaGetLastError();  // or this library's next check would report it once more
    FUSED_CNN_CHECK(error == cudaSuccess, "product of ", gemm.m, " x ", gemm.k, " and ", gemm.k, " x ", gemm.n,
                    ": launch failed: ", cudaGetErrorString(error));
  }
};

// relu(convolution + bias + residual) of a convolution's result, its channels into the slices in order. bias is
// contiguous.
inline void finish_convolution(const Tensor& convolution, const std::optional<Tensor>& bias, const RowView& residual,
                               bool relu, const std::vector<GemmSlice>& slices) {
  const RowView y = rows_of(convolution);
  std::vector<BiasResidualRelu> branches;
  int64_t first = 0;
  for (const GemmSlice& slice : slices) {
    branches.push_back({.y = y.from(first),
                        .bias = bias ? at(bias->data_ptr(), first, bias->element_size()) : nullptr,
                        .residual = residual.data ? residual.from(first) : Rows{},
                        .out = slice.rows,
                        .channels = slice.columns});
    first += slice.columns;
  }
  bias_residual_relu</*kWideBias=*/false>(convolution, branches, relu, row_count(convolution));
}

// relu(x weight^T + bias + residual), its columns into the slices in order. x has (N, C, H, W), `in` its rows; weight
// is (out, C, 1, 1) and bias (out,), both contiguous and of x's type.
inline void pointwise(const Tensor& x, const RowView& in, const Tensor& weight, const std::optional<Tensor>& bias,
                      const RowView& residual, bool relu, const std::vector<GemmSlice>& slices) {
  const DType dtype = dtype_of("pointwise", "x", x);
  const int64_t rows = row_count(x), inputs = x.size(1), outputs = weight.size(0);
  if (rows == 0 || outputs == 0) return;
  bool supported = gemm_supports(dtype, rows, inputs, outputs) && slices.size() <= kGemmSlices;
  for (const GemmSlice& s : slices) supported &= aligned16(s.rows, x.element_size()) && s.columns % 8 == 0;
  const int device = x.get_device_index();
  if (supported) {
    if (const GemmKernels kernels(device); kernels) {
      const RowView a = on_16_bytes(in), addend = residual.data ? on_16_bytes(residual) : residual;
      const Tensor b = on_16_bytes(weight), vector = bias ? on_16_bytes(*bias) : Tensor();
      Gemm gemm{.kind = GemmKind::forward,
                .dtype = dtype,
                .a = a,
                .b = {b.data_ptr(), inputs},
                .m = static_cast<int>(rows),
                .n = static_cast<int>(outputs),
                .k = static_cast<int>(inputs),
                .batch = 1,
                .epilogue = {.bias = bias ? vector.data_ptr() : nullptr,
                             .residual = addend,
                             .relu = relu,
                             .slices = static_cast<int>(slices.size())}};
      std::copy(slices.begin(), slices.end(), gemm.epilogue.slice);
      gemm.tile = gemm_tile(gemm, device, kernels.multiprocessors);
      return kernels.run(Launch(x), gemm);
    }
  }
  finish_convolution(aten_convolution(x, weight, std::nullopt, same_padding(1)), bias, residual, relu, slices);
}

}  // namespace fused_cnn
