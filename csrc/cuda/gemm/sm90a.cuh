// Products on sm_90a: TMA loads, wgmma, a producer warp and two consumer warpgroups that take turns at whole tiles, so
// that one's epilogue runs under the other's products (CUTLASS's ping-pong schedule); persistent. 128 KiB of shared
// memory are in flight; a number of stages that is no power of two costs registers that are not there.
#pragma once
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include "cuda/gemm/cutlass.cuh"

namespace fused_cnn {

template <typename T, typename Out, class LayoutA, class LayoutB, int kColumns>
cudaError_t gemm_sm90a(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
  using namespace cute;
  using Element = cutlass_t<T>;
  using Tile = Shape<Int<kColumns>, Int<kColumns>, _64>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA, 8, Element, LayoutB, 8, float, Tile,
      Shape<_1, _1, _1>, cutlass::gemm::collective::StageCount<kColumns == 128 ? 4 : 8>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<SliceEpilogue<T, Out>>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
  typename Kernel::StrideA a{};
  typename Kernel::StrideB b{};
  if constexpr (std::is_same_v<LayoutA, cutlass::layout::RowMajor>) {
    get<0>(a) = gemm.a.pitch, get<0>(b) = gemm.b.pitch;
  } else {
    get<1>(a) = gemm.a.pitch, get<1>(b) = gemm.b.pitch;
  }
  get<2>(a) = gemm.a_batch_stride, get<2>(b) = gemm.b_batch_stride;
  return launch_cutlass<Kernel>(gemm, a, b, multiprocessors, stream);
}

template <typename T>
cudaError_t gemm_sm90a(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  switch (gemm.kind) {
    case GemmKind::wide:
      return gemm_sm90a<T, T, Row, Column, 128>(gemm, multiprocessors, stream);
    case GemmKind::narrow:
      return gemm_sm90a<T, T, Row, Column, 64>(gemm, multiprocessors, stream);
    case GemmKind::sums:
      return gemm_sm90a<T, float, Column, Row, 128>(gemm, multiprocessors, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fused_cnn
