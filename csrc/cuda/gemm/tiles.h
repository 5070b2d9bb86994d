// The ways to run a convolution on tensor cores, which of them a problem runs with, and what an architecture has.
#pragma once
#include <algorithm>
#include <span>
#include "cuda/gemm/gemm.h"

namespace fused_cnn {

// What a convolution is run by: a tile of the product, for 1x1 windows of stride 1; one of the implicit product, whose
// result is one slice, over x itself or, for a window of stride 2 over few channels, over x with each 2 x 2 pixels as
// the channels of one (space_to_depth.cuh); the library's convolution and one pass for what follows (a strided 1x1
// window is then a product over a copy of the pixels that it reads); the library's convolution with bias and ReLU; for
// a network's first convolution and the pool behind it (cuda/stem.h), and for a 1x1 convolution and the pool before it
// (cuda/pooled_pointwise.h), a kernel of both; a tile of the implicit product whose inner dimension is split among a
// cluster's blocks (sm90a_split.cuh); or, for an Inception block, its branches beside each other while a graph is
// captured (cuda/side_streams.cuh), where the library's stands for one after the other.
enum class TileKind {
  product,
  convolution,
  space_to_depth,
  library,
  library_fused,
  stem,
  split,
  pooled_product,
  branches,
};

constexpr int kMostStemInputs = 4, kMostStemKernel = 8;           // of space_to_depth
constexpr int kStemInputs = 3, kStemKernel = 7, kStemStride = 2;  // of stem: at most so many, and just these

// What a problem is of: a convolution; one and the max pool behind it, or the 3x3 one of stride 1 before it, where the
// library's tile stands for the convolution, a problem of its own, and the pool; or a whole Inception block, whose k
// are its inputs and whose kernel its two windows, and of which others with as many outputs in all have the tile, too.
constexpr int kConvolution = 0, kPoolBehind = 1, kPoolBefore = 2, kBlock = 3;

// A problem as the tables have it (fused_cnn/_tables.py): m rows and n columns of the result, k channels under the
// window. One of float32 is in TF32: where that is not allowed there is none, and the library computes exactly.
// `library_takes_all`: it is what library_fused may do, with a result of its own under ReLU and no residual.
struct Problem {
  int64_t device, dtype, m, n, k, residual, slices, kernel_height, kernel_width, stride, library_takes_all, scope;

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

  // Whether it takes elements of which so many lie in 16 bytes: all but the stem's bring 128 bytes of k at a time.
  constexpr bool takes(int vector) const {
    return is_library() || (kind == TileKind::stem ? vector == 8 : k == 8 * vector);
  }
  constexpr bool is_library() const { return kind == TileKind::library || kind == TileKind::library_fused; }
  constexpr bool is_instance() const {  // of instances.h
    return !is_library() && kind != TileKind::stem && kind != TileKind::pooled_product && kind != TileKind::branches;
  }
  bool suits(const Problem& problem) const {
    if (kind == TileKind::branches || problem.scope == kBlock) {
      return problem.scope == kBlock && (kind == TileKind::branches || kind == TileKind::library);
    }
    const int vector = in_16_bytes(static_cast<DType>(problem.dtype));
    const bool whole_vectors = problem.inputs() % vector == 0;
    if (!takes(vector)) return false;
    if (kind == TileKind::stem) {
      return problem.slices == 1 && !problem.residual && problem.stride == kStemStride &&
             problem.kernel_height == kStemKernel && problem.kernel_width == kStemKernel &&
             problem.inputs() <= kStemInputs;
    }
    if (kind == TileKind::pooled_product) {
      return problem.scope == kPoolBefore && problem.is_product() && whole_vectors && problem.slices == 1 &&
             !problem.residual;
    }
    if (problem.scope != kConvolution) return kind == TileKind::library;
    if (kind == TileKind::product) {
      return problem.is_product() && whole_vectors && (problem.slices == 1 || !problem.residual);
    }
    if (kind == TileKind::split) return whole_vectors && problem.slices == 1;
    if (kind == TileKind::convolution) return !problem.is_product() && whole_vectors && problem.slices == 1;
    if (kind == TileKind::space_to_depth) {
      return problem.slices == 1 && problem.stride == 2 && problem.inputs() <= kMostStemInputs &&
             std::max(problem.kernel_height, problem.kernel_width) <= kMostStemKernel;
    }
    return kind == TileKind::library || problem.library_takes_all;
  }
};

// Predicates of problems and the number of multiprocessors.
namespace tiles {
inline bool always(const Problem&, int) {
  return true;
}
inline bool never(const Problem&, int) {
  return false;
}
// Enough tiles of so many rows and columns that every multiprocessor has work.
inline bool fills(const Problem& problem, int rows, int columns, int multiprocessors) {
  return (problem.m + rows - 1) / rows * ((problem.n + columns - 1) / columns) >= multiprocessors;
}
// A window whose bias and ReLU would be a pass behind the library's convolution.
inline bool needs_pass(const Problem& problem) {
  return !problem.library_takes_all && problem.kernel_height * problem.kernel_width > 1;
}
}  // namespace tiles

// Of 16-bit types alone: cp.async leaves float32 as it is, and mma.sync would cut it off to TF32, not round it.
inline constexpr Tile kSm80Tiles[] = {
    {.kind = TileKind::product,
     .m = 128,
     .n = 128,
     .k = 64,
     .when = [](const Problem& problem,
                int multiprocessors) { return problem.n > 64 && tiles::fills(problem, 128, 128, 2 * multiprocessors); },
     .measured = ""},
    {.kind = TileKind::product, .m = 64, .n = 64, .k = 64, .when = tiles::always, .measured = ""},
    {.kind = TileKind::stem, .m = 112, .n = 64, .k = 16, .when = tiles::always, .measured = ""},
    {.kind = TileKind::pooled_product, .m = 256, .n = 128, .k = 64, .when = tiles::always, .measured = ""},
    {.kind = TileKind::branches, .m = 0, .n = 0, .k = 0, .when = tiles::never, .measured = ""},
    {.kind = TileKind::library_fused, .m = 0, .n = 0, .k = 0, .when = tiles::never, .measured = ""},
    {.kind = TileKind::library, .m = 0, .n = 0, .k = 0, .when = tiles::always, .measured = ""},
};

// Each line of `measured` is of an H100, 2026-11-28, in microseconds: of bfloat16 but for tiles of 32 in k, which are
// float32's; (m, k) x (k, n). "A block" is the time of a whole Inception block, of which this is one convolution.
inline constexpr Tile kSm90aTiles[] = {
    {.kind = TileKind::product,
     .m = 256,
     .n = 128,
     .k = 64,
     .when =
         [](const Problem& problem, int multiprocessors) {
           return problem.n > 64 && (problem.residual || problem.slices > 1 || problem.k <= 256) &&
                  tiles::fills(problem, 256, 128, multiprocessors);
         },
     .measured = "(802816, 64) x (64, 256) + residual: 345; 128 x 128: 416; the library and a pass: 673"},
    {.kind = TileKind::product,
     .m = 128,
     .n = 128,
     .k = 64,
     .when =
         [](const Problem& problem, int multiprocessors) {
           return problem.n > 64 && problem.slices == 1 && tiles::fills(problem, 128, 128, multiprocessors);
         },
     .measured = "(200704, 512) x (512, 256): 120; 256 x 128: 132; cuDNN's fused call: 128"},
    {.kind = TileKind::product,
     .m = 128,
     .n = 64,
     .k = 64,
     .when = [](const Problem& problem,
                int multiprocessors) { return tiles::fills(problem, 128, 64, multiprocessors); },
     .measured = "(802816, 256) x (256, 64): 183; 128 x 128: 204; cuDNN's fused call: 187"},
    {.kind = TileKind::product,
     .m = 64,
     .n = 64,
     .k = 64,
     .when = tiles::always,
     .measured = "(784, 128) x (128, 512) + residual: 8; 128 x 64: 9; the library and a pass: 12"},
    // Of float32 in TF32. The product's accumulators are all that a warpgroup's registers hold, its six stages with the
    // epilogue all of the shared memory, and the other warpgroup's products hide the epilogue. Wider than 64 columns a
    // convolution's block would be alone on its multiprocessor.
    {.kind = TileKind::product,
     .m = 128,
     .n = 128,
     .k = 32,
     .when =
         [](const Problem& problem, int multiprocessors) {
           return !problem.library_takes_all && tiles::fills(problem, 128, 128, multiprocessors / 2);
         },
     .measured = "(802816, 64) x (64, 256) + residual: 700; the library and a pass: 1237"},
    {.kind = TileKind::convolution,
     .m = 128,
     .n = 64,
     .k = 32,
     .when = [](const Problem& problem, int) { return tiles::needs_pass(problem) && problem.k <= 512; },
     .measured = "3x3, 32 -> 128 at 14, batch 256: a block 572; the library and a pass: 585, ahead for more channels"},
    {.kind = TileKind::space_to_depth,
     .m = 128,
     .n = 64,
     .k = 64,
     .when = tiles::always,
     .measured = "7x7 stride 2 of 3 channels at 224, batch 256, and its pool: 652; the library's and its pool: 2320"},
    {.kind = TileKind::stem,
     .m = 112,
     .n = 64,
     .k = 16,
     .when = tiles::always,
     .measured =
         "7x7 stride 2 of 3 channels at 224, batch 256, and its pool: 282; the pool behind the tile above: 652"},
    {.kind = TileKind::pooled_product,
     .m = 256,
     .n = 128,
     .k = 64,
     .when = [](const Problem& problem,
                int multiprocessors) { return tiles::fills(problem, 256, 128, multiprocessors); },
     .measured =
         "(200704, 256) x (256, 64): a block 436, 505 with a pool of its own; (196, 480) x (480, 64): 54 and 40"},
    {.kind = TileKind::convolution,
     .m = 128,
     .n = 192,
     .k = 64,
     .when =
         [](const Problem& problem, int multiprocessors) {
           return problem.n % 192 == 0 && (tiles::needs_pass(problem) || problem.inputs() <= 64) &&
                  tiles::fills(problem, 128, 192, multiprocessors);
         },
     .measured = "3x3, 64 -> 192 at 56, batch 256: 440; 128 x 64: 587; cuDNN's fused call: 700"},
    {.kind = TileKind::split,
     .m = 64,
     .n = 64,
     .k = 64,
     .when =
         [](const Problem& problem, int multiprocessors) {
           return tiles::needs_pass(problem) && !tiles::fills(problem, 128, 64, multiprocessors / 10);
         },
     .measured = "3x3, 192 -> 384 at 7, batch 1: a block 49; the library and a pass: 51; the tile below: 53"},
    {.kind = TileKind::convolution,
     .m = 128,
     .n = 64,
     .k = 64,
     .when =
         [](const Problem& problem, int multiprocessors) {
           return tiles::needs_pass(problem) && problem.k <= 1152 &&
                  !tiles::fills(problem, 128, 64, 2 * multiprocessors);
         },
     .measured = "3x3, 48 -> 128 at 7, batch 256: a block 131; the library and a pass: 141"},
    {.kind = TileKind::branches, .m = 0, .n = 0, .k = 0, .when = tiles::never, .measured = ""},
    {.kind = TileKind::library_fused,
     .m = 0,
     .n = 0,
     .k = 0,
     .when = tiles::always,
     .measured = "3x3, 64 -> 64 at 56: batch 256: 149, with a pass of our own 222; batch 1: 9, with a pass 13"},
    {.kind = TileKind::library, .m = 0, .n = 0, .k = 0, .when = tiles::always, .measured = ""},
};

// The one of them that a problem runs with (cuda/choices.cu).
const Tile& tile_for(const Problem& problem, std::span<const Tile> candidates, int multiprocessors);

// What an architecture has; a launch's error says why it could not be. In a product of several slices each one's rows
// of b begin at a multiple of `slice_step`.
struct TensorCores {
  std::span<const Tile> tiles;
  int slice_step;
  cudaError_t (*product)(const Gemm& gemm, int multiprocessors, cudaStream_t stream);
  cudaError_t (*convolution)(const Convolution& conv, int multiprocessors, cudaStream_t stream);
};

// That of this build for GPUs of compute capability major.x; null where it has none (cuda/tensor_cores.cu).
const TensorCores* tensor_cores(int major);

}  // namespace fused_cnn
