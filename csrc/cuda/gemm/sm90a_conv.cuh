// Convolutions on sm_90a as implicit products: TMA brings the pixels under each tap of the window by its im2col mode,
// zeros where they lie outside, and the epilogue is the products'. One block a tile; two blocks share a multiprocessor,
// so that one computes under the other's epilogue.
#pragma once
#include <cute/tensor.hpp>  // first: CUTLASS's headers of convolutions forget it
#include <cutlass/cutlass.h>
#include <cutlass/kernel_hardware_info.hpp>
#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/convnd_problem_shape.hpp>
#include <cutlass/conv/convolution.h>
#include <cutlass/conv/kernel/conv_universal.hpp>
#include "cuda/gemm/instances.h"
#include "cuda/gemm/tma_epilogue.cuh"

namespace fused_cnn {

template <typename T, int kRows, int kColumns>
struct Sm90aConvolution {
  // Two blocks share a multiprocessor, and with the epilogue's each has half of the shared memory; but for wide tiles,
  // whose registers leave room for one.
  static constexpr int kStages = ((kColumns > 128 ? 192 : 96) << 10) / ((kRows + kColumns) * 128);
  using Layout = cutlass::layout::TensorNHWC;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Stock = TmaEpilogue<T, cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, Step<T>>, /*kCooperative=*/false>;
  using Epilogue = Sliced<Stock, kColumns>;
  using Mainloop = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::conv::Operator::kFprop, cutlass_t<T>, Layout,
      kIn16Bytes<T>, cutlass_t<T>, Layout, kIn16Bytes<T>, float,
      cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::Shape<Step<T>>>, Cluster,
      cutlass::conv::collective::StageCount<kStages>, cutlass::conv::collective::KernelScheduleAuto>::CollectiveOp;
  using Problem = cutlass::conv::ConvProblemShape<cutlass::conv::Operator::kFprop, 2>;
  using Kernel = cutlass::conv::kernel::ConvUniversal<Problem, Mainloop, Epilogue>;

  static cudaError_t run(const Convolution& conv, cudaStream_t stream) {
    using Element = cutlass_t<T>;
    const int64_t line = int64_t{conv.kernel[1]} * conv.inputs;
    typename Kernel::Arguments arguments{};
    arguments.problem_shape = Problem(
        cutlass::conv::Mode::kCrossCorrelation, {conv.images, conv.size[0], conv.size[1], conv.inputs},
        {conv.image, conv.row, conv.pixel, 1}, {conv.outputs, conv.kernel[0], conv.kernel[1], conv.inputs},
        {conv.kernel[0] * line, line, conv.inputs, 1}, {conv.padding[0], conv.padding[1]},
        {conv.padding[0], conv.padding[1]}, {conv.stride[0], conv.stride[1]}, {conv.dilation[0], conv.dilation[1]},
        /*groups=*/1);
    arguments.mainloop.ptr_A = static_cast<const Element*>(conv.x);
    arguments.mainloop.ptr_B = static_cast<const Element*>(conv.weight);
    arguments.epilogue.slices = 1;
    arguments.epilogue.columns[0] = conv.outputs;
    arguments.epilogue.slice[0] = tma_arguments<Stock>(conv.epilogue, conv.epilogue.slice[0].rows, 0);
    return launch_kernel<Kernel>(Kernel::to_underlying_arguments(arguments, nullptr), stream);
  }
};

template <typename T, int kRows, int kColumns>
cudaError_t sm90a_convolution(const Convolution& conv, cudaStream_t stream) {
  return Sm90aConvolution<T, kRows, kColumns>::run(conv, stream);
}

}  // namespace fused_cnn
