// What conv_engine.cpp (compiled once, for the base instruction set) and the kernels (compiled once per level) tell
// each other: one Plan per call, cut into items that any thread may run, and one table of functions per level. Only
// plain structs may appear here: an inline function could be emitted by an AVX-512 file and then be linked everywhere.
#pragma once
#include "cpu/engine/conv_engine.h"
#include "cpu/level.h"

namespace fused_cnn::engine {

constexpr int kPanelVectors = 2;

// Matrix units multiply pixels by 32 elements along K at a time, here 32 pixels per call.
constexpr int kMatrixStep = 32, kMatrixPixels = 32;

// How the K axis, all (kh, kw, c), is walked: taps_h * taps_w runs of `run` consecutive elements. Usually a run is one
// pixel's C channels; with few channels it is a kernel row, kernel_w * C elements, which are contiguous in NHWC too.
struct Reduction {
  int64_t taps_h, taps_w, run;
  int64_t padded;  // the run and the zeros behind it in the packed weight, a multiple of the elements of one step
  bool fold;       // a run is a kernel row: pixels must then lie exactly C apart
};

// What F(2 x 4, 3 x 3) adds to a plan, see conv_winograd.inc. Its items are blocks of tiles by groups of panels.
constexpr int kWinogradPositions = 24;
struct Winograd {
  const void* weight;   // packed: [panel][position][C][lanes], float; null where the convolution has no such form
  int64_t panel_bytes;  // 0 where the convolution has no such form
  int64_t tiles_y, tiles_x, tiles, blocks;
  int64_t block_tiles;  // in a block, at most
  int64_t pitch;        // floats between the transformed pixels of neighbouring tiles
  int* nonfinite;       // set where a result is, which then may not be where it should
};

// The convolution as blocks of output pixels (block_h x block_w, of one image) by groups of weight panels. An unpadded
// 1x1 stride-1 convolution is planned as one image of one row that holds every pixel.
struct Plan {
  ConvShape shape;
  ConvArgs args;
  DType dtype;
  Reduction reduction;
  int64_t out_h, out_w;
  int64_t block_h, block_w, blocks_y, blocks_x;
  int64_t vectors, panels, groups;
  int64_t items, workers;                   // block by block, and for each block the groups
  bool tiles_first;                         // loop order within an item
  int64_t vector_of[kMaxDestinations + 1];  // first vector of each destination
  const float* bias;                        // packed: one float per lane of every vector
  const void* weight;                       // packed: [panel][taps_h][taps_w][padded run][lanes], see pack_direct
  int64_t panel_bytes;                      // of a full panel
  int64_t bias_bytes, direct_bytes, packed_bytes;  // of what is packed: the bias, it and `weight`, everything

  // Where gather is set, the input of a block is first copied to scratch, with its zero padding, as in_h x in_w pixels
  // `pitch` elements apart. Strides that no tap needs (a 1x1 kernel's) are dropped by the copy: step_h, step_w.
  bool gather;
  int64_t in_h, in_w, pitch, step_h, step_w;

  // With matrix units the copy takes the strides out for every kernel: the scratch is phases_h x phases_w images of
  // in_h x in_w pixels, image (p, q) holding the input's rows p, p + stride_h, ... and columns q, q + stride_w, ...
  // Every tap then meets evenly spaced pixels, tap_offset[tap] bytes after those that the first tap meets.
  bool matrix;
  int64_t phases_h, phases_w;
  const int64_t* tap_offset;

  Winograd winograd;
};

// What a thread keeps between items: its scratch, and the block that the scratch holds (-1: none).
struct Scratch {
  void* data;
  int64_t block;
};

// A part of a max pool's backward: the input rows of image n from the top of output row `first`'s windows to that of
// `last`'s, and `vectors` of channels from c on, as far as there are so many.
struct PoolBand {
  int64_t n, first, last, c, vectors;
};

// The functions of one element type.
struct Kernels {
  int k_step;  // elements of K per step: 1 where bf16 is widened to float first, 2 for products of pairs, kMatrixStep
  void (*pack_panel)(const Plan& plan, const void* const* weight, const float* const* bias, int64_t panel);
  void (*run_item)(const Plan& plan, int64_t item, Scratch& scratch);
  void (*run_item_winograd)(const Plan& plan, int64_t item, Scratch& scratch);
  void (*max_pool_row)(const Window& window, Rows x, void* out, int64_t row);
  // `ring` has room for the band's vectors of each pixel of as many rows as a window reaches over.
  void (*max_pool_backward)(const Window& window, Rows x, const void* grad_out, void* grad_x, const PoolBand& band,
                            float* ring);
};

struct Level {
  int lanes;        // floats per vector; a panel is two vectors
  int tile_pixels;  // output pixels per microkernel call, at most
  Kernels f32, bf16;
};

}  // namespace fused_cnn::engine

namespace fused_cnn {
FUSED_CNN_KERNEL(extern const engine::Level engine_level)
}
