// What the products on CUTLASS share: element types, our epilogue under CUTLASS's name, the tiles, and the launch.
#pragma once
#include <cutlass/bfloat16.h>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/device_kernel.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/half.h>
#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include "cuda/gemm/epilogue.cuh"

namespace fused_cnn {

template <typename T>
using cutlass_t = std::conditional_t<std::is_same_v<T, bf16_t>, cutlass::bfloat16_t, cutlass::half_t>;

// A collective epilogue that hands the accumulators to epilogue_store(). Accumulators are ((2, 2[, groups]), M, N): two
// columns, two rows eight apart, then groups of 8 columns.
template <typename T>
class SliceEpilogue {
 public:
  using EpilogueSchedule = cutlass::epilogue::NoSmemWarpSpecialized;
  using DispatchPolicy = EpilogueSchedule;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using ElementScalar = float;
  using ElementOutput = cutlass_t<T>;
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

  static constexpr Params to_underlying_arguments(const auto&, const Arguments& arguments, void*) { return arguments; }
  static size_t get_workspace_size(const auto&, const Arguments&) { return 0; }
  static cutlass::Status initialize_workspace(const auto&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  static bool can_implement(const auto&, const Arguments&) { return true; }

  CUTLASS_HOST_DEVICE SliceEpilogue(const Params& params, const SharedStorage& = SharedStorage()) : params_(params) {}
  CUTLASS_DEVICE bool is_source_needed() { return false; }

  template <class Engine, class Layout>
  CUTLASS_DEVICE void operator()(auto shape, auto tile, auto at, const cute::Tensor<Engine, Layout>& accumulators,
                                 auto mma, auto, int thread, char*) {
    using namespace cute;
    constexpr int kAtom = size<0>(Layout{}) / 4, kM = size<1>(Layout{}), kGroups = kAtom * size<2>(Layout{});
    static_assert(kGroups % 4 == 0);
    const auto index = [=](int i, int j, int m, int group) {
      return i + 2 * j + 4 * (group % kAtom) + 4 * kAtom * (m + kM * (group / kAtom));
    };
    const Tensor place = mma.get_thread_slice(thread).partition_C(make_identity_tensor(take<0, 2>(tile)));
    const int64_t first_row = int64_t(get<0>(at)) * size<0>(tile);
    const int first_column = int(get<1>(at)) * size<1>(tile) - 2 * (thread % 4);
    CUTLASS_PRAGMA_UNROLL
    for (int m = 0; m < kM; ++m) {
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 2; ++j) {
        CUTLASS_PRAGMA_UNROLL
        for (int group = 0; group < kGroups; group += 4) {
          float pairs[4][2];
          int columns[4];
          CUTLASS_PRAGMA_UNROLL
          for (int o = 0; o < 4; ++o) {
            pairs[o][0] = accumulators(index(0, j, m, group + o));
            pairs[o][1] = accumulators(index(1, j, m, group + o));
            columns[o] = first_column + int(get<1>(place(index(0, j, m, group + o))));
          }
          epilogue_store<T>(params_, pairs, first_row + get<0>(place(index(0, j, m, group))), columns, get<0>(shape),
                            get<1>(shape));
        }
      }
    }
  }

 private:
  Params params_;
};

// CUTLASS leaves a descriptor empty that the driver refuses.
inline bool refused(std::initializer_list<const cute::TmaDescriptor*> made) {
  constexpr cute::TmaDescriptor empty{};
  return std::any_of(made.begin(), made.end(), [&](auto* d) { return std::memcmp(d, &empty, sizeof empty) == 0; });
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
