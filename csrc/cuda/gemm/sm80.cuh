// Products for every GPU from sm_80 on: cp.async loads in three stages, ldmatrix, and mma.sync of 16 x 8 x 16. One
// block a tile, of 256 threads for tiles of 128 and of 128 for tiles of 64.
#pragma once
#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_mma.hpp>
#include "cuda/gemm/cutlass.cuh"
#include "cuda/gemm/instances.h"
#include "cuda/gemm/tiles.h"

namespace fused_cnn {

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

}  // namespace fused_cnn
