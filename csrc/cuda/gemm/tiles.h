// The ways to run a convolution on tensor cores, which of them a problem runs with, and what an architecture has.
#pragma once
#include <algorithm>
#include <span>
#include "cuda/gemm/gemm.h"

namespace fused_cnn {

// What a convolution is run by: a tile of the product, for 1x1 windows over adjacent pixels; one of the implicit
// product, whose result is one slice, over x itself or, for a window of stride 2 over few channels, over x with each
// 2 x 2 pixels as the channels of one (space_to_depth.cuh); the library's convolution and one pass for what follows; or
// its convolution with bias and ReLU, for results of their own under ReLU and without a residual (`under_relu`).
enum class TileKind { product, convolution, space_to_depth, library, library_fused };

constexpr int kMostStemInputs = 4, kMostStemKernel = 8;  // of space_to_depth

// A problem as the tables have it (fused_cnn/_tables.py): m rows and n columns of the result, k channels under the
// window.
struct Problem {
  int64_t device, dtype, m, n, k, residual, slices, kernel_height, kernel_width, stride, under_relu;

  bool is_product() const { return kernel_height == 1 && kernel_width == 1 && stride == 1; }
  int64_t inputs() const { return k / (kernel_height * kernel_width); }
  auto operator<=>(const Problem&) const = default;
};

// A way to run it: a candidate. Where nothing was measured, the first in the architecture's order whose `when` holds
// runs. `measured` is what put it there: shape, figure, GPU, date.
struct Tile {
  TileKind kind;
  int m, n, k;
  bool (*when)(const Problem& problem, int multiprocessors);
  const char* measured;

  bool suits(const Problem& problem) const {
    if (kind == TileKind::product) return problem.is_product() && (problem.slices == 1 || !problem.residual);
    if (kind == TileKind::convolution) return !problem.is_product() && problem.slices == 1 && problem.inputs() % 8 == 0;
    if (kind == TileKind::space_to_depth) {
      return problem.slices == 1 && problem.stride == 2 && problem.inputs() <= kMostStemInputs &&
             std::max(problem.kernel_height, problem.kernel_width) <= kMostStemKernel;
    }
    return kind == TileKind::library || problem.under_relu;
  }
};

namespace tiles {
inline bool always(const Problem&, int) {
  return true;
}
inline bool never(const Problem&, int) {
  return false;
}
// Of 128 x 128, two for every multiprocessor.
inline bool many(const Problem& problem, int multiprocessors) {
  const int64_t count = (problem.m + 127) / 128 * ((problem.n + 127) / 128);
  return problem.n > 64 && count >= 2 * multiprocessors;
}
inline bool is_product(const Problem& problem, int) {
  return problem.is_product();
}
}  // namespace tiles

inline constexpr Tile kSm80Tiles[] = {
    {TileKind::product, 128, 128, 64, tiles::many, ""},
    {TileKind::product, 64, 64, 64, tiles::is_product, ""},
    {TileKind::library_fused, 0, 0, 0, tiles::never, ""},
    {TileKind::library, 0, 0, 0, tiles::always, ""},
};

inline constexpr Tile kSm90aTiles[] = {
    {TileKind::product, 128, 128, 64, tiles::many, ""},
    {TileKind::product, 128, 64, 64, tiles::is_product, ""},
    {TileKind::product, 64, 64, 64, tiles::never, ""},
    {TileKind::product, 64, 256, 64, tiles::never, ""},
    {TileKind::product, 128, 256, 64, tiles::never, ""},
    {TileKind::product, 256, 128, 64, tiles::never, ""},
    {TileKind::space_to_depth, 128, 64, 64, tiles::always, ""},
    {TileKind::convolution, 128, 64, 64, tiles::never, ""},
    {TileKind::convolution, 128, 128, 64, tiles::never, ""},
    {TileKind::library_fused, 0, 0, 0, tiles::never, ""},
    {TileKind::library, 0, 0, 0, tiles::always, ""},
};

// The one of them that a problem runs with (cuda/choices.cu).
const Tile& tile_for(const Problem& problem, std::span<const Tile> candidates, int multiprocessors);

// What an architecture has; a launch's error says why it could not be. `whole_tiles`: in a product of several slices
// each one's rows of b begin at a multiple of the tile's columns.
struct TensorCores {
  std::span<const Tile> tiles;
  bool whole_tiles;
  cudaError_t (*product)(const Gemm& gemm, int multiprocessors, cudaStream_t stream);
  cudaError_t (*convolution)(const Convolution& conv, cudaStream_t stream);
};

// That of this build for GPUs of compute capability major.x; null where it has none (cuda/tensor_cores.cu).
const TensorCores* tensor_cores(int major);

}  // namespace fused_cnn
