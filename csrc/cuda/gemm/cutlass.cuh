// What the products on CUTLASS share: element types, our epilogue under CUTLASS's name, and the launch.
#pragma once
#include <cutlass/bfloat16.h>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/device_kernel.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/half.h>
#include <cstring>
#include <type_traits>
#include "cuda/gemm/epilogue.cuh"

namespace fused_cnn {

template <typename T>
using cutlass_t = std::conditional_t<std::is_same_v<T, bf16_t>, cutlass::bfloat16_t, cutlass::half_t>;

// A collective epilogue that hands the accumulators to finish_octets(). Accumulators are ((2, 2[, octets]), M, N): two
// columns, two rows eight apart, then octets of columns.
template <typename T, typename Out>
class SliceEpilogue {
 public:
  using EpilogueSchedule = cutlass::epilogue::NoSmemWarpSpecialized;
  using DispatchPolicy = EpilogueSchedule;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using ElementScalar = float;
  using ElementOutput = std::conditional_t<std::is_same_v<Out, float>, float, cutlass_t<T>>;
  using ElementC = ElementOutput;
  using ElementD = ElementOutput;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideD = StrideC;
  using GmemTiledCopyC = void;
  using GmemTiledCopyD = void;
  struct SharedStorage {};
  using TensorStorage = SharedStorage;
  using Arguments = GemmEpilogue;
  using Params = GemmEpilogue;

  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }

  CUTLASS_HOST_DEVICE SliceEpilogue(const Params& params, const SharedStorage& = SharedStorage()) : params_(params) {}
  CUTLASS_DEVICE bool is_source_needed() { return false; }

  template <class Shape, class Tile, class Coord, class Engine, class Layout, class TiledMma, class Residue>
  CUTLASS_DEVICE void operator()(Shape shape, Tile tile, Coord at, const cute::Tensor<Engine, Layout>& accumulators,
                                 TiledMma mma, Residue, int thread, char*) {
    using namespace cute;
    constexpr int kAtom = size<0>(Layout{}) / 4, kM = size<1>(Layout{}), kOctets = kAtom * size<2>(Layout{});
    static_assert(kOctets % 4 == 0);
    const auto index = [=](int i, int j, int m, int octet) {
      return i + 2 * j + 4 * (octet % kAtom) + 4 * kAtom * (m + kM * (octet / kAtom));
    };
    const Tensor place = mma.get_thread_slice(thread).partition_C(make_identity_tensor(take<0, 2>(tile)));
    const int64_t first_row = int64_t(get<0>(at)) * size<0>(tile);
    const int first_column = int(get<1>(at)) * size<1>(tile) - 2 * (thread % 4);
    CUTLASS_PRAGMA_UNROLL
    for (int m = 0; m < kM; ++m) {
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 2; ++j) {
        CUTLASS_PRAGMA_UNROLL
        for (int octet = 0; octet < kOctets; octet += 4) {
          float pairs[4][2];
          int columns[4];
          CUTLASS_PRAGMA_UNROLL
          for (int o = 0; o < 4; ++o) {
            pairs[o][0] = accumulators(index(0, j, m, octet + o));
            pairs[o][1] = accumulators(index(1, j, m, octet + o));
            columns[o] = first_column + int(get<1>(place(index(0, j, m, octet + o))));
          }
          finish_octets<T, Out>(params_, pairs, first_row + get<0>(place(index(0, j, m, octet))), columns,
                                get<0>(shape), get<1>(shape), get<3>(at));
        }
      }
    }
  }

 private:
  Params params_;
};

template <class Kernel>
cudaError_t launch_cutlass(const Gemm& gemm, typename Kernel::StrideA a, typename Kernel::StrideB b,
                           int multiprocessors, cudaStream_t stream) {
  using Element = typename Kernel::ElementA;
  typename Kernel::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {gemm.m, gemm.n, gemm.k, gemm.batch};
  arguments.mainloop.ptr_A = static_cast<const Element*>(gemm.a.data), arguments.mainloop.dA = a;
  arguments.mainloop.ptr_B = static_cast<const Element*>(gemm.b.data), arguments.mainloop.dB = b;
  arguments.epilogue = gemm.epilogue;
  arguments.hw_info.sm_count = multiprocessors;
  const auto parameters = Kernel::to_underlying_arguments(arguments, nullptr);
  // CUTLASS leaves a descriptor empty that the driver refuses.
  if constexpr (requires { parameters.mainloop.tma_load_a; }) {
    constexpr cute::TmaDescriptor empty{};
    for (const auto* made :
         {parameters.mainloop.tma_load_a.get_tma_descriptor(), parameters.mainloop.tma_load_b.get_tma_descriptor()}) {
      if (std::memcmp(made, &empty, sizeof empty) == 0) return cudaErrorInvalidValue;
    }
  }
  const auto kernel = cutlass::device_kernel<Kernel>;
  if (Kernel::SharedStorageSize >= 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = Kernel::get_grid_shape(parameters);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, parameters);
}

// body(std::integral_constant<int, i>{}) for the tile of index i.
template <int i = 0, typename Body>
cudaError_t with_gemm_tile(int tile, const Body& body) {
  if constexpr (i < kGemmTileCount) {
    return tile == i ? body(std::integral_constant<int, i>{}) : with_gemm_tile<i + 1>(tile, body);
  } else {
    return cudaErrorInvalidValue;
  }
}

}  // namespace fused_cnn
