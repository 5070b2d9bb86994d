// Convolutions of stride 1 on sm_90a, each pixel brought into shared memory once for all taps of the window (sliding.h
// says how it lies there). Two warpgroups of a block have half of a tile's rows each, all threads bring pixels and
// weights; two blocks share a multiprocessor, so that one computes while the other waits or stores.
//
// The inner dimension goes by chunks of channels, in each by taps, in each by units of 16 channels, of which a step has
// four. Weights lie in a ring of slots, a step's in each.
#pragma once
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/instances.h"
#include "cuda/gemm/sliding.h"
#include "cuda/wgmma.cuh"

namespace fused_cnn {

// The units of a tap in a chunk.
__device__ inline int units_in(const Sliding& s, int chunk) {
  const int left = (s.inputs + kSlidingUnit - 1) / kSlidingUnit - chunk * s.units;
  return left < s.units ? left : s.units;
}

// A step, in the order in which a block takes them.
struct SlidingStep {
  int item, chunk, step;  // of all tiles; of the tile; of the chunk
  int units, steps;       // of the chunk

  __device__ SlidingStep(const Sliding& s, int item) : item(item) { begin(s, 0); }
  __device__ void begin(const Sliding& s, int which) {
    chunk = which;
    step = 0;
    units = units_in(s, chunk);
    steps = (s.taps * units + kSlidingUnits - 1) / kSlidingUnits;
  }
  __device__ void next_chunk(const Sliding& s) {
    if (chunk + 1 == s.chunks) item += gridDim.x;
    begin(s, chunk + 1 == s.chunks ? 0 : chunk + 1);
  }
  __device__ void next(const Sliding& s) {
    if (++step == steps) next_chunk(s);
  }
};

// What a thread brings of a chunk's pixels: 8 channels of one in every pass.
template <typename T>
struct SlidingPixels {
  const T* from;  // the first pixel of x, at the channels
  bool inside;    // there are such channels
  int image, y, x;
  unsigned char* to;
  int left;  // pixels of the tile from this one on

  __device__ void begin(const Sliding& s, int rows, const SlidingStep& at, unsigned char* buffer) {
    const int eight = threadIdx.x & ((1 << s.lanes) - 1), first = threadIdx.x >> s.lanes;
    const int channel = at.chunk * s.units * kSlidingUnit + 8 * eight;
    from = static_cast<const T*>(s.x) + channel;
    inside = channel < s.inputs && eight < 2 * at.units;
    const int size = s.frame * s.line;  // of an image, by which the position is made positive
    const int position = at.item / s.column_tiles * rows - s.before + first + size;
    image = position / size - 1;
    y = position % size / s.line;
    x = position % size % s.line;
    to = buffer + eight * s.plane + first * 16;
    left = eight < 2 * at.units ? s.pixels - first : 0;
  }
  __device__ void pass(const Sliding& s) {
    if (left <= 0) return;
    const bool there = inside && image >= 0 && image < s.images && y < s.height && x < s.width;
    copy_16_async(to, there ? from + image * s.image + y * s.row + x * s.pixel : from, there);
    x += s.pass_columns;
    y += s.pass_rows + (x >= s.line);
    image += s.pass_images + (y >= s.frame);
    x -= x >= s.line ? s.line : 0;
    y -= y >= s.frame ? s.frame : 0;
    to += kSlidingThreads >> s.lanes << 4;
    left -= kSlidingThreads >> s.lanes;
  }
};

template <typename T, int kRows, int kColumns>
__global__ void __launch_bounds__(kSlidingThreads, 2) sliding_kernel(const __grid_constant__ Sliding s) {
  constexpr int kParts = kRows / 2 / 64;  // of a warpgroup's rows
  constexpr int kSlotBytes = sliding_slot_bytes(kColumns), kPlane = kSlotBytes / (2 * kSlidingUnits);
  FUSED_CNN_DYNAMIC_SHARED(memory, kSlidingShared);
  unsigned char* const weights = memory + kSlidingZeros;
  unsigned char* const buffers = weights + kSlidingSlots * kSlotBytes;
  const int thread = threadIdx.x, first_row = thread / 128 * (kRows / 2);
  const int items = s.row_tiles * s.column_tiles;

  // A step's weights, of each output of the tile 8 channels of a unit a thread, zeros where there are none.
  const auto load_weights = [&](const SlidingStep& at, int slot) {
    const int eight = thread % 8, unit = at.step * kSlidingUnits + eight / 2, tap = unit / at.units;
    const int channel = (at.chunk * s.units + unit - tap * at.units) * kSlidingUnit + eight % 2 * 8;
    const bool inside = tap < s.taps && channel < s.inputs;
    const int first = at.item % s.column_tiles * kColumns;
    const T* const from = static_cast<const T*>(s.weight);
    unsigned char* const to = weights + slot * kSlotBytes + eight * kPlane;
#pragma unroll
    for (int i = 0; i < kColumns * 8 / kSlidingThreads; ++i) {
      const int row = thread / 8 + i * kSlidingThreads / 8, output = first + row;
      const bool there = inside && output < s.outputs;
      const int64_t place = (int64_t{output} * s.taps + tap) * s.inputs + channel;
      copy_16_async(to + row * 16, there ? from + place : from, there);
    }
  };

  if (thread < kSlidingZeros / 16) copy_16_async(memory + thread * 16, s.x, /*inside=*/false);
  const SharedOperand zeros = shared_operand(memory, 0, 0);
  float sums[kParts][kColumns / 8][4];
  SlidingPixels<T> pixels;
  SlidingStep at(s, blockIdx.x), ahead = at;
  const auto load_ahead = [&](int slot) {
    if (ahead.item < items) load_weights(ahead, slot);
    ahead.next(s);
  };
  pixels.begin(s, kRows, at, buffers);
#pragma unroll 1
  while (pixels.left > 0) pixels.pass(s);
#pragma unroll
  for (int i = 0; i < kSlidingAhead; ++i) {
    load_ahead(i);
    end_copies();
  }
  int slot = 0, buffer = 0;
#pragma unroll 1
  while (at.item < items) {
    SlidingStep next = at;
    next.next_chunk(s);
    const bool is_last = next.item != at.item, more = next.item < items;
    const int units = s.taps * at.units;
    int depth = 0, column = 0, shift = 0;  // of a unit: which of its tap, the tap's column, and its distance
#pragma unroll 1
    for (; at.step < at.steps; ++at.step) {
      // One buffer's pixels are a group of their own, the last one; two buffers' have come long before.
      s.buffers == 1 && at.step == 0 ? await_copies_for_products<0>() : await_copies_for_products<kSlidingAhead - 1>();
      // Past the chunk's last unit weights are zeros, and so are these pixels.
      const SharedOperand first = shared_operand(buffers + buffer * s.buffer_bytes + first_row * 16, s.plane);
      SharedOperand pixels_of[kSlidingUnits];
#pragma unroll
      for (int u = 0; u < kSlidingUnits; ++u) {
        const bool inside = at.step * kSlidingUnits + u < units;
        pixels_of[u] = inside ? first + (depth * (s.plane / 8) + shift) : zeros;
        ++depth;  // without branches, between which products would be groups of their own
        const bool is_tap = depth == at.units;
        depth = is_tap ? 0 : depth;
        column += is_tap;
        shift += is_tap ? s.tap_column : 0;
        const bool is_row = column == s.kernel_width;
        column = is_row ? 0 : column;
        shift += is_row ? s.tap_row - s.kernel_width * s.tap_column : 0;
      }
      __syncthreads();
      begin_products();
      const SharedOperand weights_of = shared_operand(weights + slot * kSlotBytes, kPlane);
#pragma unroll
      for (int u = 0; u < kSlidingUnits; ++u) {
        const bool add = u > 0 || at.step > 0 || at.chunk > 0;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          multiply_add<T, kColumns>(sums[part], pixels_of[u] + 64 * part, weights_of + u * (2 * kPlane / 16), add);
        }
      }
      end_products();
      // The slot and the buffer that are filled now were read by the products before the last, which are done.
      load_ahead((slot + kSlidingAhead) % kSlidingSlots);
      if (s.buffers == 2 && more && at.step > 0) {
        if (at.step == 1) pixels.begin(s, kRows, next, buffers + (1 - buffer) * s.buffer_bytes);
#pragma unroll 1
        for (int i = 0; i < s.passes; ++i) pixels.pass(s);
      }
      end_copies();
      await_products<1>();
      slot = (slot + 1) % kSlidingSlots;
    }
    if (s.buffers == 2) {
      buffer = 1 - buffer;
    } else {
      await_products<0>();
      __syncthreads();
      if (more) {
        pixels.begin(s, kRows, next, buffers);
#pragma unroll 1
        for (int i = 0; i < s.passes; ++i) pixels.pass(s);
      }
      end_copies();
    }
    if (is_last) {
      await_products<0>();
      const int first = at.item % s.column_tiles * kColumns, size = s.frame * s.line;
      const int64_t rows = int64_t{s.images} * s.out_height * s.out_width;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        keep(sums[part]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int position = at.item / s.column_tiles * kRows + first_row + 64 * part + thread % 128 / 32 * 16 +
                               thread % 32 / 4 + 8 * half;
          const int image = position / size, y = position % size / s.line, x = position % size % s.line;
          const bool inside = image < s.images && y < s.out_height && x < s.out_width;
          const int64_t row = inside ? (int64_t{image} * s.out_height + y) * s.out_width + x : rows;
#pragma unroll
          for (int group = 0; group < kColumns / 32; ++group) {
            float pairs[4][2];
            int columns[4];
#pragma unroll
            for (int o = 0; o < 4; ++o) {
              columns[o] = first + 32 * group + 8 * o;
#pragma unroll
              for (int i = 0; i < 2; ++i) pairs[o][i] = sums[part][4 * group + o][2 * half + i];
            }
            epilogue_store<T>(s.epilogue, pairs, row, columns, rows, s.outputs);
          }
        }
      }
    }
    at = next;
  }
}

template <typename T, int kRows, int kColumns>
cudaError_t sm90a_sliding(const Convolution& conv, int multiprocessors, cudaStream_t stream) {
  const Sliding s = sliding_plan(conv, kRows, kColumns);
  if (s.chunks == 0) return cudaErrorInvalidValue;
  const auto kernel = sliding_kernel<T, kRows, kColumns>;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::min(s.row_tiles * s.column_tiles, 2 * multiprocessors));
  config.blockDim = dim3(kSlidingThreads);
  config.dynamicSmemBytes = sliding_bytes(s, kColumns);
  config.stream = stream;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSlidingShared);
  return error == cudaSuccess ? cudaLaunchKernelEx(&config, kernel, s) : error;
}

}  // namespace fused_cnn
