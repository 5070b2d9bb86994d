// Products on sm_90a: TMA loads, wgmma, a producer warp and two consumer warpgroups. Persistent: one block of 384 threads
// on every multiprocessor, tiles that share rows of x one behind the other. A 1x1 convolution is bound by memory: it
// reads x, residual and weight and writes the result once.
#pragma once
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/epilogue/collective/detail.hpp>
#include "cuda/gemm/instances.h"
#include "cuda/gemm/tma_epilogue.cuh"

namespace fused_cnn {

template <typename T, bool kAlongK, class Tile, class Stages, class Schedule>
using Sm90aMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass_t<T>,
    std::conditional_t<kAlongK, cutlass::layout::RowMajor, cutlass::layout::ColumnMajor>, 8, cutlass_t<T>,
    std::conditional_t<kAlongK, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>, 8, float, Tile,
    cute::Shape<cute::_1, cute::_1, cute::_1>, Stages, Schedule>::CollectiveOp;

// A forward product's tiles: ping-pong, the two warpgroups taking turns at whole tiles, so that one's epilogue runs
// under the other's products; where one warpgroup's registers do not hold a tile, both are at one together.
template <typename T, int kRows, int kColumns>
struct Sm90aProduct {
  static constexpr bool kCooperative = kRows * kColumns > 128 * 128;
  using Tile = cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::_64>;
  using Stock = TmaEpilogue<T, Tile, kCooperative>;
  using Epilogue = Sliced<Stock, kColumns>;
  using Mainloop =
      Sm90aMainloop<T, true, Tile,
                    cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Stock::SharedStorage)>,
                    std::conditional_t<kCooperative, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                                       cutlass::gemm::KernelTmaWarpSpecializedPingpong>>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;

  // Where there are several slices, each one's rows of b begin at a multiple of kColumns.
  static cudaError_t run(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
    typename Epilogue::Arguments arguments;
    arguments.slices = gemm.epilogue.slices;
    int first = 0, columns = 0;
    for (int s = 0; s < gemm.epilogue.slices; ++s) {
      const GemmSlice& slice = gemm.epilogue.slice[s];
      arguments.columns[s] = slice.columns;
      arguments.slice[s] = tma_arguments<Stock>(gemm.epilogue, slice.rows, first);
      columns = (columns + kColumns - 1) / kColumns * kColumns + slice.columns;
      first += slice.columns;
    }
    return launch_product<Kernel, /*kAlongK=*/true>(gemm, columns, arguments, multiprocessors, stream);
  }
};

// 128 KiB of shared memory are in flight; a number of stages that is no power of two costs registers that are not
// there.
template <typename T>
struct Sm90aWgrad {
  using Tile = cute::Shape<cute::_128, cute::_128, cute::_64>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<
      cute::Shape<int, int, int, int>,
      Sm90aMainloop<T, false, Tile, cutlass::gemm::collective::StageCount<4>,
                    cutlass::gemm::KernelTmaWarpSpecializedPingpong>,
      cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<SliceEpilogue<T, float>>>;
};

}  // namespace fused_cnn
