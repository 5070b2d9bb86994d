// Products on sm_90a: TMA loads, wgmma, a producer warp and two consumer warpgroups that take turns at whole tiles, so
// that one's epilogue runs under the other's products (CUTLASS's ping-pong schedule). Persistent: one block of 384
// threads on every multiprocessor. 128 KiB of shared memory are in flight; a number of stages that is no power of two
// costs registers that are not there. A 1x1 convolution is bound by memory: it reads x, residual and weight and writes
// the result once. ResNet-50's (batch 256, bfloat16) on an H200 (2026-11-26): tiles of 64 0.80 of the copy's bandwidth
// (layer1.conv1), tiles of 128 0.18 (layer1.conv3 with its residual), which wait for the epilogue's loads.
#pragma once
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include "cuda/gemm/cutlass.cuh"

namespace fused_cnn {

template <typename T, typename Out, bool kAlongK, int kRows, int kColumns, int kStep>
struct Sm90aGemm {
  using Element = cutlass_t<T>;
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  static constexpr int kStages = (128 << 10) / ((kRows + kColumns) * kStep * static_cast<int>(sizeof(T)));
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, std::conditional_t<kAlongK, Row, Column>, 8,
      Element, std::conditional_t<kAlongK, Column, Row>, 8, float,
      cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::Int<kStep>>, cute::Shape<cute::_1, cute::_1, cute::_1>,
      cutlass::gemm::collective::StageCount<kStages>, cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<SliceEpilogue<T, Out>>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
};

}  // namespace fused_cnn
