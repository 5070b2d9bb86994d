// Products for every GPU from sm_80 on: cp.async loads in three stages, ldmatrix, and mma.sync of 16 x 8 x 16. One
// block a tile, of 256 threads for tiles of 128 and of 128 for tiles of 64.
#pragma once
#include <cute/tensor.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/gemm/collective/collective_mma.hpp>
#include "cuda/gemm/cutlass.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/instances.h"
#include "cuda/gemm/tiles.h"

namespace fused_cnn {

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

// How so many threads bring an operand's tile, rows of adjacent k, to shared memory, how it lies there, and how warps
// read it.
template <class Element, int kThreads>
struct Sm80Operand {
  template <int kRows, int kColumns>
  using RowMajor =
      cute::Layout<cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>, cute::Stride<cute::Int<kColumns>, cute::_1>>;

  using Load = cute::Copy_Atom<cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<cute::uint128_t>, Element>;
  using Gmem = decltype(cute::make_tiled_copy(Load{}, RowMajor<kThreads / 8, 8>{}, RowMajor<1, 8>{}));
  using Smem = decltype(cute::composition(cute::Swizzle<3, 3, 3>{}, RowMajor<8, 64>{}));
  using Read = cute::Copy_Atom<cute::SM75_U32x4_LDSM_N, Element>;
};

template <typename T, int kRows, int kColumns, int kStep>
struct Sm80Gemm {
  using Element = cutlass_t<T>;
  static constexpr int kWarps = kColumns / 32;  // along the columns, by two along the rows
  using Operand = Sm80Operand<Element, 64 * kWarps>;
  using Atom = std::conditional_t<std::is_same_v<T, bf16_t>, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                  cute::SM80_16x8x16_F32F16F16F32_TN>;
  using Mma = cute::TiledMMA<cute::MMA_Atom<Atom>, cute::Layout<cute::Shape<cute::_2, cute::Int<kWarps>, cute::_1>>,
                             cute::Tile<cute::_32, cute::Int<16 * kWarps>, cute::_16>>;
  using Stride = cute::Stride<int64_t, cute::_1, int64_t>;
  using Mainloop = cutlass::gemm::collective::CollectiveMma<
      cutlass::gemm::MainloopSm80CpAsync<3>, cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::Int<kStep>>,
      Element, Stride, Element, Stride, Mma, typename Operand::Gmem, typename Operand::Smem, typename Operand::Read,
      cute::identity, typename Operand::Gmem, typename Operand::Smem, typename Operand::Read, cute::identity>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, SliceEpilogue<T>>;
};

template <typename T, size_t kPlace = 0>
cudaError_t run_sm80(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
  constexpr Tile tile = kSm80Tiles[kPlace];
  if constexpr (tile.kind == TileKind::product) {
    using Kernel = typename Sm80Gemm<T, tile.m, tile.n, tile.k>::Kernel;
    return gemm.tile == &kSm80Tiles[kPlace]
               ? launch_product<Kernel>(gemm, gemm.n, gemm.epilogue, multiprocessors, stream)
               : run_sm80<T, kPlace + 1>(gemm, multiprocessors, stream);
  } else {
    return cudaErrorInvalidValue;
  }
}

template <typename T>
cudaError_t sm80_product(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
  return run_sm80<T>(gemm, multiprocessors, stream);
}

}  // namespace fused_cnn
