// Products on sm_90a: TMA loads, wgmma, a producer warp and two consumer warpgroups that take turns at whole tiles, so
// that one's epilogue runs under the other's products (CUTLASS's ping-pong schedule); persistent. 128 KiB of shared
// memory are in flight; a number of stages that is no power of two costs registers that are not there.
#pragma once
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include "cuda/gemm/cutlass.cuh"

namespace fused_cnn {

constexpr int kStageBytes = 128 << 10;

template <typename T, typename Out, class LayoutA, class LayoutB, int kRows, int kColumns, int kStep>
cudaError_t gemm_sm90a(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
  using namespace cute;
  using Element = cutlass_t<T>;
  using Tile = Shape<Int<kRows>, Int<kColumns>, Int<kStep>>;
  constexpr int kStages = kStageBytes / ((kRows + kColumns) * kStep * static_cast<int>(sizeof(T)));
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA, 8, Element, LayoutB, 8, float, Tile,
      Shape<_1, _1, _1>, cutlass::gemm::collective::StageCount<kStages>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<SliceEpilogue<T, Out>>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
  constexpr int kPitch =
      std::is_same_v<LayoutA, cutlass::layout::RowMajor> ? 0 : 1;  // of the two modes, not the unit one
  typename Kernel::StrideA a{};
  typename Kernel::StrideB b{};
  get<kPitch>(a) = gemm.a.pitch;
  get<kPitch>(b) = gemm.b.pitch;
  get<2>(a) = gemm.a_batch_stride;
  get<2>(b) = gemm.b_batch_stride;
  return launch_cutlass<Kernel>(gemm, a, b, multiprocessors, stream);
}

template <typename T>
cudaError_t gemm_sm90a(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  if (gemm.kind == GemmKind::wgrad) {
    return gemm_sm90a<T, float, Column, Row, 128, 128, 64>(gemm, multiprocessors, stream);
  }
  return with_gemm_tile(gemm.tile, [&](auto index) {
    constexpr GemmTile kTile = kGemmTiles[decltype(index)::value];
    return gemm_sm90a<T, T, Row, Column, kTile.m, kTile.n, kTile.k>(gemm, multiprocessors, stream);
  });
}

}  // namespace fused_cnn
