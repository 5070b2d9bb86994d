// Convolutions of few rows on sm_90a, as for a single image: a tile's inner dimension is split among the blocks of a
// cluster, on a multiprocessor each, so that all of the GPU's memory paths bring weights. Each block adds up its part
// of the tile, and finishes some of its rows from what all have in shared memory, always in the same order. Pixels are
// gathered tap by tap: any window, stride and dilation, 1x1 windows among them.
//
// The inner dimension goes by taps, in each by units of 16 channels, of which a step has four; a ring of slots has a
// step's pixels and weights in each.
#pragma once
#include "cuda/cluster.cuh"
#include "cuda/divisor.h"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/instances.h"
#include "cuda/wgmma.cuh"

namespace fused_cnn {

constexpr int kSplitThreads = 128, kSplitRows = 64;  // one warpgroup, one product's rows
constexpr int kSplitUnit = 16, kSplitUnits = 4;      // channels of one tap; units of a step
constexpr int kSplitAhead = 4, kSplitSlots = kSplitAhead + 2;
constexpr int kMostSplits = 8;  // blocks of a cluster, as many as every GPU of the architecture takes

struct SplitProduct {
  const void *x, *weight;
  int64_t pixel, row, image;  // distances in x, in elements
  int inputs, outputs, height, width, out_height, out_width;
  int taps, kernel_width;
  Divisor by_kernel_width, by_units;  // of the window; of a tap
  int stride[2], padding[2], dilation[2];
  int rows, units_a_tap, steps;  // of the whole product
  int splits, column_tiles;
  GemmEpilogue epilogue;
};

constexpr int split_slot_bytes(int columns) {
  return 2 * kSplitUnits * (kSplitRows + 1 + columns + 1) * 16;
}
constexpr int split_bytes(int columns) {
  return kSplitSlots * split_slot_bytes(columns);
}

// A cluster a tile.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kSplitThreads) split_kernel(const __grid_constant__ SplitProduct s) {
  // Bytes from 8 channels' to the next 8's, an odd number of 16: threads beside each other write to banks of their own.
  constexpr int kPixelPlane = (kSplitRows + 1) * 16, kWeightPlane = (kColumns + 1) * 16;
  constexpr int kWeightsAt = 2 * kSplitUnits * kPixelPlane, kSlotBytes = split_slot_bytes(kColumns);
  constexpr int kLanes = 2 * kSplitUnits, kPassRows = kSplitThreads / kLanes;
  constexpr int kPasses = kSplitRows / kPassRows;
  FUSED_CNN_DYNAMIC_SHARED(memory, split_bytes(kColumns));
  const int thread = threadIdx.x, rank = blockIdx.x % s.splits, tile = blockIdx.x / s.splits;
  const int first_row = tile / s.column_tiles * kSplitRows, first_output = tile % s.column_tiles * kColumns;
  const int eight = thread % kLanes, own_row = thread / kLanes;

  // Where the window of each of this thread's rows begins; rows past the last begin outside of x for every tap.
  int64_t from[kPasses];
  int top[kPasses], left[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int row = first_row + own_row + i * kPassRows, size = s.out_height * s.out_width;
    top[i] = row < s.rows ? row % size / s.out_width * s.stride[0] - s.padding[0] : s.height;
    left[i] = row % size % s.out_width * s.stride[1] - s.padding[1];
    from[i] = row / size * s.image + top[i] * s.row + left[i] * s.pixel;
  }
  const auto load = [&](int step, int slot) {
    const int unit = step * kSplitUnits + eight / 2, tap = unit / s.by_units, tap_row = tap / s.by_kernel_width;
    const int channel = (unit - tap * s.units_a_tap) * kSplitUnit + eight % 2 * 8;
    const int down = tap_row * s.dilation[0], along = (tap - tap_row * s.kernel_width) * s.dilation[1];
    const bool inside = tap < s.taps && channel < s.inputs;
    const T* const x = static_cast<const T*>(s.x);
    const T* const weight = static_cast<const T*>(s.weight);
    unsigned char* const to = memory + slot * kSlotBytes + own_row * 16;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int y = top[i] + down, column = left[i] + along;
      const bool there = inside && y >= 0 && y < s.height && column >= 0 && column < s.width;
      const int64_t at = from[i] + down * s.row + along * s.pixel + channel;
      copy_16_async(to + eight * kPixelPlane + i * kPassRows * 16, there ? x + at : x, there);
    }
#pragma unroll
    for (int i = 0; i < kColumns / kPassRows; ++i) {
      const int output = first_output + own_row + i * kPassRows;
      const bool there = inside && output < s.outputs;
      const int64_t at = (int64_t{output} * s.taps + tap) * s.inputs + channel;
      copy_16_async(to + kWeightsAt + eight * kWeightPlane + i * kPassRows * 16, there ? weight + at : weight, there);
    }
  };

  const int first_step = s.steps * rank / s.splits, last_step = s.steps * (rank + 1) / s.splits;
#pragma unroll
  for (int i = 0; i < kSplitAhead; ++i) {
    if (first_step + i < last_step) load(first_step + i, i);
    commit_copies();
  }
  float sums[kColumns / 8][4];
  int slot = 0;
#pragma unroll 1
  for (int step = first_step; step < last_step; ++step) {
    await_copies_for_products<kSplitAhead - 1>();
    __syncthreads();
    const unsigned char* const here = memory + slot * kSlotBytes;
    const SharedOperand pixels = shared_operand(here, kPixelPlane);
    const SharedOperand weights = shared_operand(here + kWeightsAt, kWeightPlane);
    begin_products();
#pragma unroll
    for (int u = 0; u < kSplitUnits; ++u) {
      multiply_add<T, kColumns>(sums, pixels + u * (2 * kPixelPlane / 16), weights + u * (2 * kWeightPlane / 16),
                                u > 0 || step > first_step);
    }
    end_products();
    // This slot was read by the product before the last, which is done.
    if (step + kSplitAhead < last_step) load(step + kSplitAhead, (slot + kSplitAhead) % kSplitSlots);
    commit_copies();
    await_products<1>();
    slot = (slot + 1) % kSplitSlots;
  }
  await_products<0>();
  keep(sums);
  const int warp = thread / 32, pair = thread % 4 * 2, row_of_pair = 16 * warp + thread % 32 / 4;
  // Each block's part, in place of its slots.
  constexpr int kPartRow = kColumns + 4;  // rows on 16 bytes
  float* const part = reinterpret_cast<float*>(memory);
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) part[(row_of_pair + i / 2 * 8) * kPartRow + 8 * j + pair + i % 2] = sums[j][i];
  }
  cluster_arrive();
  cluster_wait();
  // Each block finishes some rows, a thread 8 columns of one at a time.
  constexpr int kVectors = kColumns / kVec, kTurns = kSplitRows * kVectors / kSplitThreads;
  const int rows = kSplitRows / s.splits;
  float values[kTurns][kVec] = {};
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = thread + turn * kSplitThreads, row = rank * rows + i / kVectors, column = i % kVectors * kVec;
    if (i >= rows * kVectors) continue;
#pragma unroll
    for (int block = 0; block < kMostSplits; ++block) {
      if (block >= s.splits) continue;
      const float4* const theirs = reinterpret_cast<const float4*>(in_block(part, block) + row * kPartRow + column);
#pragma unroll
      for (int j = 0; j < kVec / 4; ++j) {
        const float4 four = theirs[j];
        values[turn][4 * j] += four.x;
        values[turn][4 * j + 1] += four.y;
        values[turn][4 * j + 2] += four.z;
        values[turn][4 * j + 3] += four.w;
      }
    }
  }
  cluster_arrive();  // before the stores, for which it would wait
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = thread + turn * kSplitThreads, row = first_row + rank * rows + i / kVectors;
    const int column = first_output + i % kVectors * kVec;
    if (i < rows * kVectors && row < s.rows && column < s.outputs) {
      finish_and_store<T>(s.epilogue, values[turn], row, column);
    }
  }
  cluster_wait();  // no block ends while others read what it has
}

template <typename T, int kRows, int kColumns>
cudaError_t sm90a_split(const Convolution& conv, int multiprocessors, cudaStream_t stream) {
  static_assert(kRows == kSplitRows);
  SplitProduct s{.x = conv.x,
                 .weight = conv.weight,
                 .pixel = conv.pixel,
                 .row = conv.row,
                 .image = conv.image,
                 .inputs = conv.inputs,
                 .outputs = conv.outputs,
                 .height = conv.size[0],
                 .width = conv.size[1],
                 .out_height = conv.result_size(0),
                 .out_width = conv.result_size(1),
                 .taps = conv.kernel[0] * conv.kernel[1],
                 .kernel_width = conv.kernel[1],
                 .stride = {conv.stride[0], conv.stride[1]},
                 .padding = {conv.padding[0], conv.padding[1]},
                 .dilation = {conv.dilation[0], conv.dilation[1]},
                 .splits = 1,
                 .column_tiles = ceil_div(conv.outputs, kColumns),
                 .epilogue = conv.epilogue};
  s.rows = conv.images * s.out_height * s.out_width;
  s.units_a_tap = ceil_div(s.inputs, kSplitUnit);
  s.steps = ceil_div(s.taps * s.units_a_tap, kSplitUnits);
  s.by_units = divisor(s.units_a_tap);
  s.by_kernel_width = divisor(s.kernel_width);
  const int64_t tiles = int64_t{ceil_div(s.rows, kSplitRows)} * s.column_tiles;
  // As many as there are multiprocessors for, and two steps for each at least.
  while (s.splits < kMostSplits && 2 * s.splits * tiles <= multiprocessors && 4 * s.splits <= s.steps) s.splits *= 2;
  if (tiles * s.splits > INT32_MAX) return cudaErrorInvalidValue;

  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = s.splits;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(tiles * s.splits));
  config.blockDim = dim3(kSplitThreads);
  config.dynamicSmemBytes = split_bytes(kColumns);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const auto kernel = split_kernel<T, kColumns>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, split_bytes(kColumns));
  return error == cudaSuccess ? cudaLaunchKernelEx(&config, kernel, s) : error;
}

}  // namespace fused_cnn
