// 1x1 convolutions over rows of channels: a product on tensor cores where the shape and the type allow one, else
// cuDNN's convolution and one pass for what follows it (bias_residual_relu.cuh). Float32 takes tensor cores where
// PyTorch's switch for cuDNN allows TF32, and is cuDNN's, exactly, where it does not.
#pragma once
#include <climits>
#include "cuda/gemm/context.h"
#include "cuda/gemm/tiles.h"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "shared/aten_conv.h"
#include "shared/rows.h"

namespace fused_cnn {

constexpr int64_t kMostRows = INT_MAX - 256;  // the largest tile's more are still an int

// The switch may be another at the next call.
inline bool tensor_cores_take(DType dtype) {
  return dtype == DType::f16 || dtype == DType::bf16 || (dtype == DType::f32 && tf32_allowed());
}

inline bool gemm_supports(DType dtype, int64_t rows, int64_t inputs, int64_t outputs) {
  return tensor_cores_take(dtype) && rows > 0 && inputs > 0 && outputs > 0 && inputs % in_16_bytes(dtype) == 0 &&
         outputs % in_16_bytes(dtype) == 0 && std::max({rows, inputs, outputs}) <= kMostRows;
}

// A contiguous tensor, copied where it does not lie on 16 bytes.
inline Tensor on_16_bytes(const Tensor& t) {
  return aligned16(t.data_ptr()) ? t : torch::stable::clone(t);
}

inline RowView on_16_bytes(const RowView& rows) {
  const Tensor& t = rows.tensor;
  if (aligned16(rows, t.element_size())) return rows;
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

struct DeviceFacts {
  int major, multiprocessors;
};

// Asked of the driver once a thread and device: a convolution asks several times.
inline DeviceFacts device_facts(int device) {
  thread_local int known = -1;
  thread_local DeviceFacts facts{};
  if (device < 0 || device != known) {
    facts = {device_attribute(cudaDevAttrComputeCapabilityMajor, device),
             device_attribute(cudaDevAttrMultiProcessorCount, device)};
    known = device;
  }
  return facts;
}

// The kernels of this build for a device; false where it has none.
struct GemmKernels {
  const TensorCores* cores;
  int device, multiprocessors;

  explicit GemmKernels(int device)
      : cores(tensor_cores(device_facts(device).major)),
        device(device),
        multiprocessors(device_facts(device).multiprocessors) {}
  explicit operator bool() const { return cores != nullptr; }

  const Tile& tile_for(const Problem& problem) const {
    return fused_cnn::tile_for(problem, cores->tiles, multiprocessors);
  }
  void run(const Launch& launch, const Gemm& gemm) const {
    check(cores->product(gemm, multiprocessors, launch.stream()), "product of ", gemm.m, " x ", gemm.k, " and ", gemm.k,
          " x ", gemm.n);
  }
  void run(const Launch& launch, const Convolution& conv) const {
    check(cores->convolution(conv, multiprocessors, launch.stream()), "convolution of ", conv.images, " x ",
          conv.size[0], " x ", conv.size[1], " pixels of ", conv.inputs, " channels");
  }

 private:
  template <typename... Words>
  static void check(cudaError_t error, const Words&... what) {
    if (error != cudaSuccess) cudaGetLastError();  // or this library's next check would report it once more
    FUSED_CNN_CHECK(error == cudaSuccess, what..., ": launch failed: ", cudaGetErrorString(error));
  }
};

// relu(convolution + bias + residual) of a convolution's result, its channels into the slices in order. bias is
// contiguous.
void finish_convolution(const Tensor& convolution, const std::optional<Tensor>& bias, const RowView& residual,
                        bool relu, const std::vector<GemmSlice>& slices);

// relu(x weights^T + biases + residual), its columns into the slices in order. x has (N, C, H, W), `in` its rows; there
// is a weight (out, C, 1, 1) and a bias (out,), or no bias at all, for each slice, contiguous and of x's type. The
// tile is the one that the caller found for it, or of its own problem.
void pointwise(const Tensor& x, const RowView& in, const std::vector<Tensor>& weights,
               const std::vector<Tensor>& biases, const RowView& residual, bool relu,
               const std::vector<GemmSlice>& slices, const Tile* found = nullptr);

}  // namespace fused_cnn
