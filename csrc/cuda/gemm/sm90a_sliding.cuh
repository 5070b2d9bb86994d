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
};

// Where a pixel of the line is.
struct SlidingPlace {
  int image, y, x;

  __device__ SlidingPlace(const Sliding& s, int position)
      : image(position / s.by_frame), y((position - image * s.frame * s.line) / s.by_line) {
    x = position - (image * s.frame + y) * s.line;
  }
};

// What a thread brings of a chunk's pixels: 8 channels of one in every pass.
template <typename T>
struct SlidingPixels {
  const T* from;  // the pixel's, or where they would be
  int image, y, x;
  unsigned char* to;
  bool inside;  // there are such channels
  int left;     // pixels of the tile from this one on

  __device__ void begin(const Sliding& s, int rows, const SlidingStep& at, unsigned char* buffer) {
    const int eight = threadIdx.x & ((1 << s.lanes) - 1), first = threadIdx.x >> s.lanes;
    const int channel = at.chunk * s.units * kSlidingUnit + 8 * eight;
    // An image further on, where it is not negative.
    const SlidingPlace place(s, at.item / s.column_tiles * rows - s.before + first + s.frame * s.line);
    image = place.image - 1;
    y = place.y;
    x = place.x;
    from = static_cast<const T*>(s.x) + (image * s.image + y * s.row + x * s.pixel + channel);
    to = buffer + eight * s.plane + first * 16;
    inside = channel < s.inputs;
    left = eight < 2 * at.units ? s.pixels - first : 0;
  }
  __device__ void pass(const Sliding& s) {
    if (left <= 0) return;
    copy_16_async(to, from, inside && image >= 0 && image < s.images && y < s.height && x < s.width);
    x += s.pass_columns;
    const bool next_row = x >= s.line;
    x -= next_row ? s.line : 0;
    y += s.pass_rows + next_row;
    const bool next_image = y >= s.frame;
    y -= next_image ? s.frame : 0;
    image += s.pass_images + next_image;
    from += s.pass_distance + (next_row ? s.next_row : 0) + (next_image ? s.next_image : 0);
    to += kSlidingThreads >> s.lanes << 4;
    left -= kSlidingThreads >> s.lanes;
  }
};

// What a thread brings of the weights: in every step 8 channels of a unit, of each 32nd output of the tile.
template <typename T, int kColumns>
struct SlidingWeights {
  static constexpr int kPassRows = kSlidingThreads / (2 * kSlidingUnits);
  static_assert(kPassRows == 32 && kSlidingUnits == 4);
  SlidingStep at;
  const T* row;             // the first of its outputs' weights
  int outputs;              // from that one on
  int tap, depth, channel;  // of its unit: which tap, which of the tap's, and of the chunk's first the thread's channel

  __device__ SlidingWeights(const Sliding& s, const SlidingStep& first) : at(first) {
    begin_tile(s);
    begin_chunk(s);
  }
  __device__ void begin_tile(const Sliding& s) {
    const int output = at.item % s.column_tiles * kColumns + static_cast<int>(threadIdx.x) / (2 * kSlidingUnits);
    row = static_cast<const T*>(s.weight) + int64_t{output} * s.taps * s.inputs;
    outputs = s.outputs - output;
  }
  __device__ void begin_chunk(const Sliding& s) {
    const int eight = threadIdx.x % (2 * kSlidingUnits);
    tap = eight / 2 / at.units;
    depth = eight / 2 % at.units;
    channel = at.chunk * s.units * kSlidingUnit + eight % 2 * 8;
  }
  __device__ void load(const Sliding& s, unsigned char* slot) {
    constexpr int kPlane = sliding_slot_bytes(kColumns) / (2 * kSlidingUnits);
    const int own = channel + depth * kSlidingUnit;
    const bool inside = tap < s.taps && own < s.inputs;
    const T* const from = row + (tap * s.inputs + own);
    unsigned char* const to =
        slot + threadIdx.x % (2 * kSlidingUnits) * kPlane + threadIdx.x / (2 * kSlidingUnits) * 16;
#pragma unroll
    for (int i = 0; i < kColumns / kPassRows; ++i) {
      copy_16_async(to + i * kPassRows * 16, from + i * s.weights_of_32, inside && i * kPassRows < outputs);
    }
    const int taps = 0x11240 >> 4 * at.units & 15;  // whole ones of a step: kSlidingUnits / at.units
    depth += kSlidingUnits - taps * at.units;
    const bool next_tap = depth >= at.units;
    depth -= next_tap ? at.units : 0;
    tap += taps + next_tap;
  }
  __device__ void next(const Sliding& s) {
    const int item = at.item;
    if (++at.step < at.steps) return;
    at.next_chunk(s);
    begin_chunk(s);
    if (at.item != item) begin_tile(s);
  }
};

template <typename T, int kRows, int kColumns>
__global__ void __launch_bounds__(kSlidingThreads, 2) sliding_kernel(const __grid_constant__ Sliding s) {
  constexpr int kParts = kRows / 2 / 64;  // of a warpgroup's rows
  constexpr int kSlotBytes = sliding_slot_bytes(kColumns), kPlane = kSlotBytes / (2 * kSlidingUnits);
  static_assert((kParts - 1) * 64 * 16 + 128 <= kSlidingZeros);
  FUSED_CNN_DYNAMIC_SHARED(memory, kSlidingShared);
  unsigned char* const slots = memory + kSlidingZeros;
  unsigned char* const buffers = slots + kSlidingSlots * kSlotBytes;
  const int thread = threadIdx.x, first_row = warpgroup() * (kRows / 2);
  const int items = s.row_tiles * s.column_tiles;

  if (thread < kSlidingZeros / 16) copy_16_async(memory + thread * 16, s.x, /*inside=*/false);
  const SharedOperand zeros = shared_operand(memory, 0, 0);
  float sums[kParts][kColumns / 8][4];
  SlidingStep at(s, blockIdx.x);
  SlidingPixels<T> pixels;
  SlidingWeights<T, kColumns> weights(s, at);
  const auto load_weights = [&](int slot) {
    if (weights.at.item < items) weights.load(s, slots + slot * kSlotBytes);
    weights.next(s);
  };
  pixels.begin(s, kRows, at, buffers);
#pragma unroll 1
  while (pixels.left > 0) pixels.pass(s);
#pragma unroll 1
  for (int i = 0; i < kSlidingAhead; ++i) {
    load_weights(i);
    commit_copies();
  }
  int slot = 0, buffer = 0;
#pragma unroll 1
  while (at.item < items) {
    const int item = at.item;
#pragma unroll 1
    while (at.item == item) {
      SlidingStep next = at;
      next.next_chunk(s);
      const bool more = next.item < items;
      const int units = s.taps * at.units;
      int depth = 0, column = 0, shift = 0;  // of a unit: which of its tap, the tap's column, and its distance
#pragma unroll 1
      for (; at.step < at.steps; ++at.step) {
        // What one buffer has was brought behind all else, what two have long before.
        s.buffers == 1 && at.step == 0 ? await_copies_for_products<0>()
                                       : await_copies_for_products<kSlidingAhead - 1>();
        const SharedOperand first = shared_operand(buffers + buffer * s.buffer_bytes + first_row * 16, s.plane);
        // Without branches between products, which would make them groups of their own. Past the chunk's last unit
        // weights are zeros, and so are these pixels.
        SharedOperand pixels_of[kSlidingUnits];
        const auto next_tap = [&](bool is_tap) {
          column += is_tap;
          shift += is_tap ? s.tap_column : 0;
          const bool is_row = column == s.kernel_width;
          column = is_row ? 0 : column;
          shift += is_row ? s.tap_row - s.kernel_width * s.tap_column : 0;
        };
        if (at.units == kSlidingUnits) {  // the step is a tap
#pragma unroll
          for (int u = 0; u < kSlidingUnits; ++u) pixels_of[u] = first + (u * (s.plane / 8) + shift);
          next_tap(true);
        } else {
#pragma unroll
          for (int u = 0; u < kSlidingUnits; ++u) {
            const bool inside = at.step * kSlidingUnits + u < units;
            pixels_of[u] = inside ? first + (depth * (s.plane / 8) + shift) : zeros;
            const bool is_tap = ++depth == at.units;
            depth = is_tap ? 0 : depth;
            next_tap(is_tap);
          }
        }
        const SharedOperand weights_of = shared_operand(slots + slot * kSlotBytes, kPlane);
        __syncthreads();
        begin_products();
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
        load_weights((slot + kSlidingAhead) % kSlidingSlots);
        if (s.buffers == 2 && more && at.step > 0) {
          if (at.step == 1) pixels.begin(s, kRows, next, buffers + (1 - buffer) * s.buffer_bytes);
#pragma unroll 1
          for (int i = 0; i < s.passes; ++i) pixels.pass(s);
        }
        commit_copies();
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
        commit_copies();
      }
      at = next;
    }
    await_products<0>();
    int rows[kParts][2];  // of the result, or none: those of this thread's pairs, which lie 8 from each other
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      keep(sums[part]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + 64 * part + thread % 128 / 32 * 16 + thread % 32 / 4 + 8 * half;
        const SlidingPlace place(s, item / s.column_tiles * kRows + row);
        const bool inside = place.image < s.images && place.y < s.out_height && place.x < s.out_width;
        rows[part][half] = inside ? (place.image * s.out_height + place.y) * s.out_width + place.x : -1;
      }
    }
    const T* const bias = static_cast<const T*>(s.bias);
    const int first_output = item % s.column_tiles * kColumns, q = thread % 4;
#pragma unroll
    for (int group = 0; group < kColumns / 32; ++group) {
      const int column = first_output + 32 * group, own = column + 8 * q;
      const bool there = own < s.outputs;
      float biases[4][2] = {};
#pragma unroll
      for (int o = 0; o < 4; ++o) {
        const int output = column + 8 * o + 2 * q;
        if (!bias || output >= s.outputs) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) biases[o][i] = to_compute(bias[output + i]);
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        // Pairs of columns of the two rows: a thread's own, where it computes; of 8 columns, where it loads and
        // stores.
        uint32_t pairs[4][2] = {};
        if (s.residual.data) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (!there || rows[part][half] < 0) continue;
            const Vec8<T> residual = load_vec8<true>(s.residual.at<const T>(rows[part][half]) + own);
            uint32_t words[4];
            memcpy(words, &residual, sizeof(words));
#pragma unroll
            for (int o = 0; o < 4; ++o) pairs[o][half] = words[o];
          }
          exchange_in_quad(pairs);
        }
#pragma unroll
        for (int o = 0; o < 4; ++o) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float both[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) both[i] = sums[part][4 * group + o][2 * half + i] + biases[o][i];
            if (s.residual.data) {
#pragma unroll
              for (int i = 0; i < 2; ++i) both[i] += half_of<T>(pairs[o][half], i);
            }
            const uint32_t pair = pair_of<T>(both[0], both[1]);
            pairs[o][half] = s.relu ? max_of_pairs<T>(pair, 0) : pair;
          }
        }
        exchange_in_quad(pairs);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!there || rows[part][half] < 0) continue;
          const uint32_t words[] = {pairs[0][half], pairs[1][half], pairs[2][half], pairs[3][half]};
          Vec8<T> out;
          memcpy(&out, words, sizeof(out));
          store_vec8<true>(s.out.at<T>(rows[part][half]) + own, out);
        }
      }
    }
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
