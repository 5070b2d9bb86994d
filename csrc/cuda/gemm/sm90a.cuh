// Products on sm_90a: TMA loads, wgmma, a producer warp and two consumer warpgroups. Persistent: one block of 384
// threads on every multiprocessor, tiles that share rows of x one behind the other. A 1x1 convolution is bound by
// memory: it reads x, residual and weight and writes the result once.
#pragma once
#include <cutlass/gemm/collective/collective_builder.hpp>
#include "cuda/gemm/instances.h"
#include "cuda/gemm/tma_epilogue.cuh"

namespace fused_cnn {

// A product's tiles: ping-pong, the two warpgroups taking turns at whole tiles, so that one's epilogue runs
// under the other's products; where one warpgroup's registers do not hold a tile, both are at one together.
template <typename T, int kRows, int kColumns>
struct Sm90aProduct {
  static constexpr bool kCooperative = kRows * kColumns > 128 * 128;
  using Tile = cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, Step<T>>;
  using Stock = TmaEpilogue<T, Tile, kCooperative>;
  using Epilogue = Sliced<Stock, kColumns>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass_t<T>, cutlass::layout::RowMajor, kIn16Bytes<T>,
      cutlass_t<T>, cutlass::layout::ColumnMajor, kIn16Bytes<T>, float, Tile, cute::Shape<cute::_1, cute::_1, cute::_1>,
      cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Stock::SharedStorage)>,
      std::conditional_t<kCooperative, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                         cutlass::gemm::KernelTmaWarpSpecializedPingpong>>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;

  // Where there are several slices, each one's rows of b begin at a multiple of kSliceStep.
  static cudaError_t run(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
    typename Epilogue::Arguments arguments;
    arguments.slices = gemm.epilogue.slices;
    int first = 0, columns = 0;
    for (int s = 0; s < gemm.epilogue.slices; ++s) {
      const GemmSlice& slice = gemm.epilogue.slice[s];
      arguments.columns[s] = slice.columns;
      arguments.slice[s] = tma_arguments<Stock>(gemm.epilogue, slice.rows, first);
      columns = (columns + kSliceStep - 1) / kSliceStep * kSliceStep + slice.columns;
      first += slice.columns;
    }
    return launch_product<Kernel>(gemm, columns, arguments, multiprocessors, stream);
  }
};

template <typename T, int kRows, int kColumns>
cudaError_t sm90a_product(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
  return Sm90aProduct<T, kRows, kColumns>::run(gemm, multiprocessors, stream);
}

}  // namespace fused_cnn
