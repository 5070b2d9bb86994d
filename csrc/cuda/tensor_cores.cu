// Which of the compiled kernels (gemm/instances.h) runs a problem with its tile, by architecture.
#include <utility>
#include "cuda/gemm/instances.h"
#include "cuda/gemm/tiles.h"

namespace fused_cnn {
namespace {

// body(T{}) for the 16-bit types.
template <typename Body>
cudaError_t with_16_bits(DType dtype, const Body& body) {
  return dtype == DType::f16 ? body(f16_t{}) : body(bf16_t{});
}

#if FUSED_CNN_GEMM_SM80
constexpr TensorCores kSm80{
    .tiles = kSm80Tiles,
    .slice_step = 1,
    .product =
        [](const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
          return with_16_bits(
              gemm.dtype, [&](auto element) { return sm80_product<decltype(element)>(gemm, multiprocessors, stream); });
        },
    .convolution = nullptr,
};
#endif

#if FUSED_CNN_GEMM_SM90A
constexpr auto kIndices = std::make_index_sequence<std::size(kSm90aTiles)>();

// The same for the types that tensor cores take here.
template <typename Body>
cudaError_t with_operands(DType dtype, const Body& body) {
  return dtype == DType::f32 ? body(float{}) : with_16_bits(dtype, body);
}

// run(constant of the tile's place) for the tile that was asked for, if it is of T and a product's or, if not kProduct,
// a convolution's.
template <bool kProduct, typename T, typename Run, size_t... kAt>
cudaError_t with_tile(const Tile* wanted, const Run& run, std::index_sequence<kAt...>) {
  cudaError_t error = cudaErrorInvalidValue;
  const auto try_one = [&](auto place) {
    constexpr TileKind kind = kSm90aTiles[place].kind;
    constexpr bool is_of_type = kSm90aTiles[place].is_instance() && kSm90aTiles[place].takes(16 / sizeof(T));
    if constexpr (is_of_type && (kind == TileKind::product) == kProduct) {
      if (wanted == &kSm90aTiles[place]) error = run(place);
    }
  };
  (try_one(std::integral_constant<size_t, kAt>()), ...);
  return error;
}

constexpr TensorCores kSm90a{
    .tiles = kSm90aTiles,
    .slice_step = kSliceStep,
    .product =
        [](const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
          return with_operands(gemm.dtype, [&](auto element) {
            using T = decltype(element);
            const auto run = [&](auto place) {
              constexpr Tile tile = kSm90aTiles[place];
              return sm90a_product<T, tile.m, tile.n>(gemm, multiprocessors, stream);
            };
            return with_tile<true, T>(gemm.tile, run, kIndices);
          });
        },
    .convolution =
        [](const Convolution& conv, int multiprocessors, cudaStream_t stream) {
          return with_operands(conv.dtype, [&](auto element) {
            using T = decltype(element);
            const auto run = [&](auto place) {
              constexpr Tile tile = kSm90aTiles[place];
              if constexpr (tile.kind == TileKind::split) {
                return sm90a_split<T, tile.m, tile.n>(conv, multiprocessors, stream);
              } else {
                return sm90a_convolution<T, tile.m, tile.n>(conv, stream);
              }
            };
            return with_tile<false, T>(conv.tile, run, kIndices);
          });
        },
};
#endif

}  // namespace

const TensorCores* tensor_cores(int major) {
#if FUSED_CNN_GEMM_SM90A
  if (major == 9) return &kSm90a;
#endif
#if FUSED_CNN_GEMM_SM80
  if (major >= 8) return &kSm80;
#endif
  return nullptr;
}

}  // namespace fused_cnn
