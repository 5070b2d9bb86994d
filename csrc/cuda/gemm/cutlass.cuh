// What kernels on CUTLASS share: element types and the launch.
#pragma once
#include <cutlass/bfloat16.h>
#include <cutlass/device_kernel.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/half.h>
#include <algorithm>
#include <atomic>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include "cuda/gemm/gemm.h"

namespace fused_cnn {

// CUTLASS multiplies float in TF32: TMA rounds it to nearest even as it brings it, by which an operand is off by at
// most 2^-11 of itself (as raw bits, which wgmma cuts off, by 2^-10).
template <typename T>
using cutlass_t =
    std::conditional_t<std::is_same_v<T, float>, float,
                       std::conditional_t<std::is_same_v<T, bf16_t>, cutlass::bfloat16_t, cutlass::half_t>>;

template <typename T>
constexpr int kIn16Bytes = 16 / sizeof(T);
template <typename T>
using Step = cute::Int<8 * kIn16Bytes<T>>;  // of k on sm_90a: a row of an operand's tile is 128 bytes in shared memory

// CUTLASS leaves a tiled descriptor empty that the driver refuses; of an im2col one it says nothing.
inline bool refused(std::initializer_list<const cute::TmaDescriptor*> made) {
  constexpr cute::TmaDescriptor empty{};
  return std::any_of(made.begin(), made.end(), [&](auto* d) { return std::memcmp(d, &empty, sizeof empty) == 0; });
}

// What a kernel's shared memory is allowed to be, said once a device: each call to the driver is a good part of what a
// launch costs the host.
template <class Kernel>
cudaError_t allow_shared_memory() {
  static std::atomic<uint64_t> allowed = 0;  // a bit for each of the first 64 devices
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (allowed & bit) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(
      cutlass::device_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize);
  if (error == cudaSuccess) allowed |= bit;
  return error;
}

template <class Kernel>
cudaError_t launch_kernel(const typename Kernel::Params& parameters, cudaStream_t stream) {
  if constexpr (requires { parameters.mainloop.tma_load_a; }) {
    if (refused({parameters.mainloop.tma_load_a.get_tma_descriptor(),
                 parameters.mainloop.tma_load_b.get_tma_descriptor()})) {
      return cudaErrorInvalidValue;
    }
  }
  if constexpr (requires { parameters.epilogue.tma_refused(); }) {
    if (parameters.epilogue.tma_refused()) return cudaErrorInvalidValue;
  }
  const auto kernel = cutlass::device_kernel<Kernel>;
  if (Kernel::SharedStorageSize >= 48 << 10) {
    const cudaError_t error = allow_shared_memory<Kernel>();
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = Kernel::get_grid_shape(parameters);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, parameters);
}

// `columns` are the product's, which may be more than the results'.
template <class Kernel>
cudaError_t launch_product(const Gemm& gemm, int columns, const typename Kernel::EpilogueArguments& epilogue,
                           int multiprocessors, cudaStream_t stream) {
  using Element = typename Kernel::ElementA;
  typename Kernel::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {gemm.m, columns, gemm.k, /*batch=*/1};
  arguments.mainloop.ptr_A = static_cast<const Element*>(gemm.a.data);
  cute::get<0>(arguments.mainloop.dA) = gemm.a.pitch;
  arguments.mainloop.ptr_B = static_cast<const Element*>(gemm.b.data);
  cute::get<0>(arguments.mainloop.dB) = gemm.b.pitch;
  arguments.epilogue = epilogue;
  arguments.hw_info.sm_count = multiprocessors;
  return launch_kernel<Kernel>(Kernel::to_underlying_arguments(arguments, nullptr), stream);
}

}  // namespace fused_cnn
