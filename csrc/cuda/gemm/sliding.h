// How a convolution of stride 1 runs whose pixels come into shared memory once for all taps of the window
// (sm90a_sliding.cuh).
//
// All pixels of x lie in one line: behind each row as many columns of zeros as pad it on one side, which do for its
// right and the next row's left, and behind each image as many rows of zeros. A tap of the window is then a distance in
// that line, the same for all pixels, and results that follow each other in it need pixels that do so, too. What is
// computed behind the rows of the result is not stored.
#pragma once
#include <algorithm>
#include "cuda/divisor.h"
#include "cuda/gemm/gemm.h"

namespace fused_cnn {

constexpr int kSlidingThreads = 256;              // two warpgroups
constexpr int kSlidingUnit = 16;                  // channels of one tap: a product's inner dimension
constexpr int kSlidingUnits = 4;                  // of a step, for which weights are brought at a time
constexpr int kSlidingAhead = 2;                  // steps by which weights are brought before they are used
constexpr int kSlidingSlots = kSlidingAhead + 2;  // a step's for each of them, the one that runs and the one before
constexpr int kSlidingZeros = 1024 + 128;  // bytes, of which 128 stand for 64 rows, and others for the 64 behind them
constexpr int kSlidingShared = 113 << 10;  // bytes, so that two blocks share a multiprocessor

struct Sliding {
  const void *x, *weight;
  int64_t pixel, row, image;  // distances in x, in elements
  int images, inputs, outputs, height, width, out_height, out_width;
  int line, frame;                        // pixels from a row to the next, rows from an image to the next
  int taps, kernel_width;                 // of the window
  int tap_row, tap_column, before, span;  // distances in the line: between taps, to the first, and to the last from it
  // Channels come in chunks of so many units, of which the last may have fewer. A buffer has planes of 8 channels of
  // all pixels, `plane` bytes from one to the next: an odd number of 16, so that 8 planes are in banks of their own.
  int chunks, units, buffers, plane;
  int pixels;  // of a tile
  int buffer_bytes;
  int lanes;   // log2 of the threads that bring a pixel
  int passes;  // in which a chunk's pixels are brought, of each step
  // From a thread's pixel to that of its next pass: so many images, rows and columns, and elements of x; and how many
  // more of these where it comes to another row, or to another image.
  int pass_images, pass_rows, pass_columns;
  int64_t pass_distance, next_row, next_image;
  int64_t weights_of_32;  // elements from an output's to those of the 32nd behind it
  Divisor by_line, by_frame;
  int row_tiles, column_tiles;
  const void* bias;
  Rows residual, out;
  bool relu;
};

constexpr int sliding_slot_bytes(int columns) {
  return 2 * kSlidingUnits * (columns + 1) * 16;
}
inline int sliding_bytes(const Sliding& s, int columns) {
  return kSlidingZeros + kSlidingSlots * sliding_slot_bytes(columns) + s.buffers * s.buffer_bytes;
}

// For tiles of so many rows and columns; its `chunks` are 0 where shared memory does not hold the pixels. No side is
// padded by more than the window's reach, so that the result's rows and columns end where those of the line do.
inline Sliding sliding_plan(const Convolution& conv, int rows, int columns) {
  Sliding s{.x = conv.x,
            .weight = conv.weight,
            .pixel = conv.pixel,
            .row = conv.row,
            .image = conv.image,
            .images = conv.images,
            .inputs = conv.inputs,
            .outputs = conv.outputs,
            .height = conv.size[0],
            .width = conv.size[1],
            .out_height = conv.result_size(0),
            .out_width = conv.result_size(1),
            .line = conv.size[1] + conv.padding[1],
            .frame = conv.size[0] + conv.padding[0],
            .taps = conv.kernel[0] * conv.kernel[1],
            .kernel_width = conv.kernel[1],
            .weights_of_32 = int64_t{32} * conv.kernel[0] * conv.kernel[1] * conv.inputs,
            .bias = conv.epilogue.bias,
            .residual = conv.epilogue.residual,
            .out = conv.epilogue.slice[0].rows,
            .relu = conv.epilogue.relu};
  s.column_tiles = ceil_div(s.outputs, columns);
  const int64_t positions = int64_t{s.images} * s.frame * s.line, row_tiles = ceil_div<int64_t>(positions, rows);
  const int64_t reach = int64_t{s.line} * conv.dilation[0] * (conv.kernel[0] - 1);
  constexpr int64_t kMost = INT32_MAX / 2 - kSlidingShared;  // of a sum of two, and what a tile adds, still an int
  if (reach > kSlidingShared / 32 || positions > kMost || row_tiles * s.column_tiles > kMost) return s;
  s.row_tiles = static_cast<int>(row_tiles);
  s.by_line = divisor(s.line);
  s.by_frame = divisor(s.frame * s.line);
  s.next_row = s.row - s.line * s.pixel;
  s.next_image = s.image - s.frame * s.row;
  s.tap_row = conv.dilation[0] * s.line;
  s.tap_column = conv.dilation[1];
  s.before = conv.padding[0] * s.line + conv.padding[1];
  s.span = (conv.kernel[0] - 1) * s.tap_row + (conv.kernel[1] - 1) * s.tap_column;
  s.pixels = rows + s.span;
  s.plane = (s.pixels | 1) * 16;

  // The fewest steps: what the last one of a chunk has no units for is lost. If possible with two buffers, so that the
  // next chunk's pixels come under this one's products: from its second step to the last but kSlidingAhead.
  const int all_units = ceil_div(s.inputs, kSlidingUnit);
  const auto steps = [&](int units) { return ceil_div(s.taps * units, kSlidingUnits); };
  int least = INT32_MAX;
  Sliding best = s;
  for (s.buffers = 2; s.buffers > 0; --s.buffers) {
    for (s.chunks = ceil_div(all_units, 4); s.chunks <= all_units; ++s.chunks) {
      s.units = ceil_div(all_units, s.chunks);
      s.buffer_bytes = 2 * s.units * s.plane;
      const int last = steps(all_units - (s.chunks - 1) * s.units), all = (s.chunks - 1) * steps(s.units) + last;
      if (ceil_div(all_units, s.units) != s.chunks || sliding_bytes(s, columns) > kSlidingShared || all >= least ||
          (s.buffers == 2 && last <= kSlidingAhead)) {
        continue;
      }
      s.lanes = s.units == 1 ? 1 : s.units == 2 ? 2 : 3;
      const int pass = kSlidingThreads >> s.lanes, passes = ceil_div(s.pixels, pass);
      s.passes = s.buffers == 2 ? ceil_div(passes, last - kSlidingAhead) : passes;
      s.pass_columns = pass % s.line;
      s.pass_rows = pass / s.line % s.frame;
      s.pass_images = pass / s.line / s.frame;
      s.pass_distance = s.pass_images * s.image + s.pass_rows * s.row + s.pass_columns * s.pixel;
      least = all;
      best = s;
    }
  }
  return best;
}

}  // namespace fused_cnn
