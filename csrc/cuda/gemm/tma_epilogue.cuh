// The epilogue of products and convolutions on sm_90a: CUTLASS's own, which brings the residual by TMA, lets it wait in
// shared memory, and takes the result out the same way. Bias and activation are its fusion operations.
#pragma once
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <limits>
#include "cuda/gemm/cutlass.cuh"

namespace fused_cnn {

// The larger of a value and `lowest`, which NaN passes: ReLU where that is zero, nothing where it is minus infinity, so
// that both are one instance.
template <typename T>
struct AtLeast {
  struct Arguments {
    float lowest = 0;
  };
  CUTLASS_HOST_DEVICE T operator()(const T& value, const Arguments& arguments) const {
    return value < T(arguments.lowest) ? T(arguments.lowest) : value;
  }
};
template <typename T, int N>
struct AtLeast<cutlass::Array<T, N>> {
  using Arguments = typename AtLeast<T>::Arguments;
  CUTLASS_HOST_DEVICE cutlass::Array<T, N> operator()(const cutlass::Array<T, N>& values,
                                                      const Arguments& arguments) const {
    cutlass::Array<T, N> result;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) result[i] = AtLeast<T>{}(values[i], arguments);
    return result;
  }
};

// at_least(product + bias + residual), bias one value a column: of the result's tile, and by one warpgroup or, if
// kCooperative, by two together.
template <typename T, class Tile, bool kCooperative, class Layout = cutlass::layout::RowMajor>
using TmaEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, cute::Shape<cute::_1, cute::_1, cute::_1>,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, cutlass_t<T>, Layout, kIn16Bytes<T>, cutlass_t<T>,
    Layout, kIn16Bytes<T>,
    std::conditional_t<kCooperative, cutlass::epilogue::TmaWarpSpecializedCooperative,
                       cutlass::epilogue::TmaWarpSpecialized>,
    cutlass::epilogue::fusion::LinCombPerColBiasEltAct<AtLeast, cutlass_t<T>, float, cutlass_t<T>,
                                                       cutlass_t<T>>>::CollectiveOp;

// The arguments of slice s, whose first column is `column`. Where there is no residual, its descriptor, which must be
// one, is the result's, and nothing is read by it.
template <class Base>
typename Base::Arguments tma_arguments(const GemmEpilogue& epilogue, const Rows& to, int column) {
  using Element = typename Base::ElementD;
  typename Base::Arguments arguments{};
  const Rows& from = epilogue.residual.data ? epilogue.residual : to;
  arguments.thread.beta = epilogue.residual.data ? 1.0f : 0.0f;
  arguments.thread.bias_ptr = epilogue.bias ? static_cast<const Element*>(epilogue.bias) + column : nullptr;
  arguments.thread.activation.lowest = epilogue.relu ? 0.0f : -std::numeric_limits<float>::infinity();
  arguments.ptr_C = static_cast<const Element*>(from.data);
  arguments.ptr_D = static_cast<Element*>(to.data);
  cute::get<0>(arguments.dC) = from.pitch;
  cute::get<0>(arguments.dD) = to.pitch;
  return arguments;
}

// Several results side by side, each with descriptors of its own, whose bounds clip a last tile that is not whole: a
// tile of kColumns columns belongs to one of them, which begin at multiples of kSliceStep.
template <class Base, int kColumns>
class Sliced : public Base {
 public:
  struct Arguments {
    int slices = 0;
    int columns[kGemmSlices] = {};
    typename Base::Arguments slice[kGemmSlices];
  };
  struct Params {
    int slices = 0;
    int columns[kGemmSlices] = {};
    uint32_t tma_transaction_bytes = typename Base::Params{}.tma_transaction_bytes;  // the kernel asks for it
    typename Base::Params slice[kGemmSlices];

    bool tma_refused() const {
      for (int s = 0; s < slices; ++s) {
        if (refused({slice[s].tma_load_c.get_tma_descriptor(), slice[s].tma_store_d.get_tma_descriptor()})) return true;
      }
      return false;
    }
  };

  static Params to_underlying_arguments(const auto& shape, const Arguments& arguments, void*) {
    const auto [rows, columns, inner, batch] = shape;  // a convolution's rows are (width, height, images)
    const auto product = cute::make_shape(int(cute::size(rows)), 0, 0, int(cute::size(batch)));
    Params params;
    params.slices = arguments.slices;
    for (int s = 0; s < arguments.slices; ++s) {
      params.columns[s] = arguments.columns[s];
      params.slice[s] =
          Base::to_underlying_arguments(with_columns(product, arguments.columns[s]), arguments.slice[s], nullptr);
    }
    return params;
  }
  static size_t get_workspace_size(const auto&, const Arguments&) { return 0; }
  static cutlass::Status initialize_workspace(const auto&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  static bool can_implement(const auto&, const Arguments&) { return true; }
  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    Base::prefetch_tma_descriptors(params.slice[0]);
  }

  CUTLASS_HOST_DEVICE Sliced(const Params& params, typename Base::TensorStorage& storage)
      : Base(params.slice[0], storage), params_(params) {}

  template <class... Rest>
  CUTLASS_DEVICE auto load(auto pipeline, auto state, auto shape, Rest&&... rest) {
    return Base::load(pipeline, state, with_columns(shape, params_.columns[0]), static_cast<Rest&&>(rest)...);
  }

  template <class... Rest>
  CUTLASS_DEVICE auto store(auto load_pipeline, auto load_state, auto store_pipeline, auto store_state, auto shape,
                            auto tile, auto at, auto accumulators, auto mma, int thread,
                            typename Base::TensorStorage& storage, Rest... rest) {
    int column = int(cute::get<1>(at)), s = 0;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i + 1 < kGemmSlices; ++i) {
      const int tiles = (params_.columns[i] + kSliceStep - 1) / kSliceStep * (kSliceStep / kColumns);
      if (s == i && i + 1 < params_.slices && column >= tiles) {
        column -= tiles;
        ++s;
      }
    }
    cute::get<1>(at) = column;
    const auto here = with_columns(shape, params_.columns[s]);
    if (s == 0) {
      return Base::store(load_pipeline, load_state, store_pipeline, store_state, here, tile, at, accumulators, mma,
                         thread, storage, rest...);
    }
    return Base(params_.slice[s], storage)
        .store(load_pipeline, load_state, store_pipeline, store_state, here, tile, at, accumulators, mma, thread,
               storage, rest...);
  }

 private:
  CUTLASS_HOST_DEVICE static auto with_columns(const auto& shape, int columns) {
    return cute::make_shape(cute::get<0>(shape), columns, cute::get<2>(shape), cute::get<3>(shape));
  }

  const Params& params_;
};

}  // namespace fused_cnn
