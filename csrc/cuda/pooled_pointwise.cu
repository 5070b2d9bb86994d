// A 3x3 max pool of stride 1 and the 1x1 convolution behind it in one kernel, which reads x from memory once. What the
// pool gives is in no memory: the threads that find it hand it to tensor cores from their registers.
//
// Four neighbouring threads have a patch of 4 x 2 pixels, and each of them 4 of a step's 16 channels: 6 x 4 values of
// x, read from shared memory 8 bytes at a time, give 8 maxima. A pixel outside is the window's next inside. A warp's 8
// patches are 64 rows of a product, whose sums for up to 64 outputs stay in its registers; weights are read as x is,
// because a sum's order is free. Of each 128 bytes in shared memory, 64 channels of a pixel or of an output, the four
// steps' parts lie in an order of their own in each of four that neighbours read, so that no bank is met twice.
//
// A persistent block takes tiles, of an image or of several small ones. A stage of its shared memory has 64 channels of
// a tile's pixels, with those around it, and of the weights; stages are filled in the order of all its tiles, while
// tensor cores are at work on another.
#include "cuda/pooled_pointwise.h"
#include <algorithm>
#include <limits>
#include "cuda/gemm/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"

namespace fused_cnn {
namespace {

constexpr int kChunk = 64, kStep = 16;  // channels of a stage, and of a step of the product
constexpr int kSteps = kChunk / kStep, kStepBytes = kStep * 2, kPixelBytes = kChunk * 2;
constexpr int kPatchRows = 4, kPatchColumns = 2;
constexpr int kWarpPatches = 8, kMostPatches = 4 * kWarpPatches;  // of a tile
constexpr int kMostHalves = 2;                                    // of a block's outputs, a warp's each
constexpr int kMostStages = 4;
constexpr int kMostShared = 227 << 10, kReservedShared = 1 << 10;  // bytes of a block; what each costs beside its own

// Outputs of a warp are 32 or 64; what its registers allow.
template <int kOutputs>
constexpr int kMostThreads = (kOutputs == 32 ? 1 : kMostHalves) * kMostPatches / kWarpPatches * 32;
template <int kOutputs>
constexpr int kWarpsAtOnce = kOutputs == 32 ? 12 : 8;  // on a multiprocessor

struct Split {
  int images, height, width, inputs, outputs;
  // Tiles: images, which are whole where they are several, rows and columns of the result; how many in an image, below
  // and beside each other.
  int tile_images, tile_rows, tile_columns, bands, across, items;
  int patch_rows, patch_columns, warps;          // patches of an image in a tile; 32 threads for each 8
  int stages, pixels, weight_rows, stage_bytes;  // of a stage
};

// A tile's pixels.
struct Area {
  int first;                          // of the result, or of x
  int images, rows, columns;          // of the result
  int top, left;                      // rows and columns of x before the first
  int image_rows, x_rows, x_columns;  // of x in shared memory; of one image, and of all
};

__device__ inline Area area_of(const Split& s, int item) {
  const int column = item % s.across * s.tile_columns, row = item / s.across % s.bands * s.tile_rows;
  const int image = item / s.across / s.bands * s.tile_images;
  Area area;
  area.first = (image * s.height + row) * s.width + column;
  area.images = std::min(s.tile_images, s.images - image);
  area.rows = std::min(s.tile_rows, s.height - row);
  area.columns = std::min(s.tile_columns, s.width - column);
  area.top = row > 0;
  area.left = column > 0;
  area.image_rows = area.top + area.rows + (row + area.rows < s.height);
  area.x_rows = area.images * area.image_rows;
  area.x_columns = area.left + area.columns + (column + area.columns < s.width);
  return area;
}

struct alignas(8) Words {  // 4 channels
  uint32_t w[2];
};

__device__ inline Words load_words(const unsigned char* from) {
  return *reinterpret_cast<const Words*>(from);
}

template <typename T>
__device__ inline Words max_of_words(const Words& a, const Words& b) {
  Words larger;
#pragma unroll
  for (int i = 0; i < 2; ++i) larger.w[i] = max_of_pairs<T>(a.w[i], b.w[i]);
  return larger;
}

// Where a step's channels lie in the 128 bytes of the n-th of those that neighbouring threads read.
__device__ inline int place_of(int step, int n) {
  return (step ^ n % kSteps) * kStepBytes;
}

// Grid (blocks, outputs / a block's), 32 threads a warp of pixels and of each half of the outputs.
template <typename T, int kOutputs>
__global__ void __launch_bounds__(kMostThreads<kOutputs>, kWarpsAtOnce<kOutputs> * 32 / kMostThreads<kOutputs>)
    pooled_pointwise_kernel(Rows x, const T* __restrict__ weight, const T* __restrict__ bias, Rows out,
                            const __grid_constant__ Split s) {
  constexpr int kVectors = kChunk / kVec;
  FUSED_CNN_DYNAMIC_SHARED(memory, kMostShared);
  const int threads = blockDim.x, thread = threadIdx.x, warp = thread / 32;
  const int q = thread % 4, in_eight = thread % 32 / 4;  // of a fragment: channels, and patch or output
  const int first_output = blockIdx.y * s.weight_rows, half = warp / s.warps;  // of the block, of the warp

  // The next stage's values, zeros for the channels behind the last.
  const int own_vector = thread % kVectors, own_first = thread / kVectors, at_once = threads / kVectors;
  const auto own_place = [&](int n) { return place_of(own_vector / 2, n) + own_vector % 2 * 16; };
  unsigned loading = blockIdx.x;  // a tile, and in it:
  int loading_channel = 0, x_rows = 0, x_columns = 0;
  const T* pixels = nullptr;
  const auto enter = [&] {
    const Area area = area_of(s, static_cast<int>(loading));
    pixels = x.at<const T>(area.first - area.top * s.width - area.left) + own_vector * kVec;
    x_rows = area.x_rows;
    x_columns = area.x_columns;
  };
  enter();
  const auto load = [&](unsigned char* stage) {
    const int channel = loading_channel + own_vector * kVec;
    const bool there = channel < s.inputs;
    if (loading < static_cast<unsigned>(s.items) && channel / kStep * kStep < s.inputs) {
      const int more_rows = at_once / x_columns, more_columns = at_once % x_columns;
      int row = own_first / x_columns, column = own_first % x_columns;
      while (row < x_rows) {
        unsigned char* const to = stage + (row * x_columns + column) * kPixelBytes + own_place(column / kPatchColumns);
        copy_16_async(to, there ? pixels + loading_channel + (row * s.width + column) * x.pitch : x.data, there);
        row += more_rows;
        column += more_columns;
        if (column >= x_columns) {
          column -= x_columns;
          ++row;
        }
      }
      unsigned char* const weights = stage + s.pixels * kPixelBytes;
      for (int i = own_first; i < s.weight_rows; i += at_once) {
        const bool inside = there && first_output + i < s.outputs;
        copy_16_async(weights + i * kPixelBytes + own_place(i),
                      inside ? weight + int64_t{first_output + i} * s.inputs + channel : weight, inside);
      }
    }
    commit_copies();
    loading_channel += kChunk;
    if (loading_channel >= s.inputs) {
      loading_channel = 0;
      loading += gridDim.x;
      if (loading < static_cast<unsigned>(s.items)) enter();
    }
  };
  for (int i = 0; i + 1 < s.stages; ++i) load(memory + i * s.stage_bytes);

  const int patch = warp % s.warps * kWarpPatches + in_eight;
  const int patch_image = patch / s.patch_columns / s.patch_rows;
  const int patch_row = patch / s.patch_columns % s.patch_rows * kPatchRows;
  const int patch_column = patch % s.patch_columns * kPatchColumns;
  const int own_weights = (s.pixels + half * kOutputs + in_eight) * kPixelBytes + place_of(0, in_eight) + 8 * q;
  int stage = 0;
  for (unsigned item = blockIdx.x; item < static_cast<unsigned>(s.items); item += gridDim.x) {
    const Area area = area_of(s, static_cast<int>(item));
    const int image = std::min(patch_image, area.images - 1);
    const int first_result = area.first + (image * s.height + patch_row) * s.width + patch_column;
    const int rows_here = patch_image < area.images ? area.rows - patch_row : 0;
    const int columns_here = area.columns - patch_column;
    int rows[kPatchRows + 2], columns[kPatchColumns + 2];  // of x around the patch, in bytes
#pragma unroll
    for (int i = 0; i < kPatchRows + 2; ++i) {
      const int row = std::min(std::max(area.top + patch_row - 1 + i, 0), area.image_rows - 1);
      rows[i] = (image * area.image_rows + row) * area.x_columns * kPixelBytes;
    }
#pragma unroll
    for (int j = 0; j < kPatchColumns + 2; ++j) {
      const int column = std::min(std::max(area.left + patch_column - 1 + j, 0), area.x_columns - 1);
      columns[j] = column * kPixelBytes + place_of(0, column / kPatchColumns) + 8 * q;
    }
    float sums[kPatchRows][kOutputs / 8][4];
#pragma unroll
    for (int o = 0; o < kOutputs / 8; ++o) {
      const int output = first_output + half * kOutputs + 8 * o + 2 * q;
      const bool there = output < s.outputs;
      const float both[] = {there ? to_compute(bias[output]) : 0.0f, there ? to_compute(bias[output + 1]) : 0.0f};
#pragma unroll
      for (int i = 0; i < kPatchRows; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][o][e] = both[e % 2];
      }
    }
#pragma unroll 1
    for (int first = 0; first < s.inputs; first += kChunk) {
      await_copies(s.stages - 2);
      __syncthreads();
      load(memory + (stage == 0 ? s.stages - 1 : stage - 1) * s.stage_bytes);  // what the block is done with
      const unsigned char* const from = memory + stage * s.stage_bytes;
      stage = stage + 1 == s.stages ? 0 : stage + 1;
#pragma unroll 1
      for (int step = 0; step < kSteps && first + step * kStep < s.inputs; ++step) {
        const int other = step * kStepBytes;
        Words across[kPatchRows + 2][kPatchColumns], pooled[kPatchRows][kPatchColumns];
#pragma unroll
        for (int i = 0; i < kPatchRows + 2; ++i) {
          Words values[kPatchColumns + 2];
#pragma unroll
          for (int j = 0; j < kPatchColumns + 2; ++j) {
            values[j] = load_words(from + rows[i] + (columns[j] ^ other));
          }
          const Words both = max_of_words<T>(values[1], values[2]);
          across[i][0] = max_of_words<T>(values[0], both);
          across[i][1] = max_of_words<T>(both, values[3]);
        }
#pragma unroll
        for (int i = 0; i < kPatchRows; i += 2) {
#pragma unroll
          for (int j = 0; j < kPatchColumns; ++j) {
            const Words both = max_of_words<T>(across[i + 1][j], across[i + 2][j]);
            pooled[i][j] = max_of_words<T>(across[i][j], both);
            pooled[i + 1][j] = max_of_words<T>(both, across[i + 3][j]);
          }
        }
#pragma unroll
        for (int o = 0; o < kOutputs / 8; ++o) {
          const Words b = load_words(from + (own_weights ^ other) + o * 8 * kPixelBytes);
#pragma unroll
          for (int i = 0; i < kPatchRows; ++i) {
            const uint32_t a[2][2] = {{pooled[i][0].w[0], pooled[i][1].w[0]}, {pooled[i][0].w[1], pooled[i][1].w[1]}};
            multiply_add<T, 2>(sums[i][o], a, b.w);
          }
        }
      }
    }
    // The four exchange what they have of four groups of 8 outputs, so that each has one whole.
#pragma unroll
    for (int o = 0; o < kOutputs / 8; o += 4) {
      const int output = first_output + half * kOutputs + 8 * (o + q);
#pragma unroll
      for (int i = 0; i < kPatchRows; ++i) {
        uint32_t pairs[4][kPatchColumns];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
          for (int j = 0; j < kPatchColumns; ++j) {
            pairs[e][j] = pair_of<T>(relu(sums[i][o + e][2 * j]), relu(sums[i][o + e][2 * j + 1]));
          }
        }
        exchange_in_quad(pairs);
#pragma unroll
        for (int j = 0; j < kPatchColumns; ++j) {
          if (i >= rows_here || j >= columns_here || output >= s.outputs) continue;
          const uint32_t words[] = {pairs[0][j], pairs[1][j], pairs[2][j], pairs[3][j]};
          Vec8<T> result;
          memcpy(&result, words, sizeof(result));
          store_vec8<true>(out.at<T>(first_result + i * s.width + j) + output, result);
        }
      }
    }
  }
}

struct Device {
  int multiprocessors = 0, shared = 0, shared_of_block = 0;  // bytes that a multiprocessor has, and a block may have

  explicit Device(int device) {
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    cudaDeviceGetAttribute(&shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    shared_of_block = std::min({shared_of_block, shared - kReservedShared, kMostShared});
    FUSED_CNN_CHECK(multiprocessors > 0 && shared_of_block > 0, "CUDA device ", device, " has no multiprocessors");
  }
};

// Of all tiles those of which a multiprocessor moves the least to its shared memory.
void split(Split& s, const Device& device) {
  int64_t least = std::numeric_limits<int64_t>::max();
  const auto consider = [&](int columns, int quads, int images) {
    Split found = s;
    found.bands = ceil_div(s.height, quads * kPatchRows);
    found.tile_images = images;
    found.tile_rows = ceil_div(s.height, found.bands);
    found.tile_columns = columns;
    found.bands = ceil_div(s.height, found.tile_rows);
    found.across = ceil_div(s.width, columns);
    found.patch_rows = ceil_div(found.tile_rows, kPatchRows);
    found.patch_columns = ceil_div(columns, kPatchColumns);
    found.warps = ceil_div(images * found.patch_rows * found.patch_columns, kWarpPatches);
    found.pixels = images * std::min(found.tile_rows + 2, s.height) * std::min(columns + 2, s.width);
    const int64_t items = int64_t{ceil_div(s.images, images)} * found.bands * found.across;
    found.items = static_cast<int>(items);
    found.stage_bytes = (found.pixels + s.weight_rows) * kPixelBytes;
    const int64_t cost = ceil_div<int64_t>(items, device.multiprocessors) * found.stage_bytes;
    if (cost >= least || 2 * found.stage_bytes > device.shared_of_block) return;
    least = cost;
    s = found;
  };
  const int widest = std::min(ceil_div(s.width, kPatchColumns), kMostPatches);
  for (int patches = widest; patches > 0; --patches) {
    const int columns = std::min(patches * kPatchColumns, s.width);
    for (int quads = 1; quads <= kMostPatches / patches; ++quads) {
      consider(columns, quads, 1);
      const bool whole = columns == s.width && quads * kPatchRows >= s.height;
      for (int images = 2; whole && images <= std::min(kMostPatches / patches / quads, s.images); ++images) {
        consider(columns, quads, images);
      }
      if (quads * kPatchRows >= s.height) break;
    }
  }
}

}  // namespace

void run_pooled_pointwise(const Tensor& x, const RowView& in, const Tensor& weight, const Tensor& bias,
                          const GemmSlice& out) {
  const Device device(x.get_device_index());
  const Launch launch(x);
  const auto run = [&](auto element, auto columns) {
    using T = decltype(element);
    constexpr int kOutputs = columns;
    Split s{.images = static_cast<int>(x.size(0)),
            .height = static_cast<int>(x.size(2)),
            .width = static_cast<int>(x.size(3)),
            .inputs = static_cast<int>(x.size(1)),
            .outputs = out.columns,
            .weight_rows = out.columns > kOutputs ? kMostHalves * kOutputs : kOutputs};
    split(s, device);
    const int warps = s.warps * (s.weight_rows / kOutputs);
    const int resident =
        std::max(1, std::min({kWarpsAtOnce<kOutputs> / warps, device.shared / (2 * s.stage_bytes + kReservedShared),
                              static_cast<int>(ceil_div<int64_t>(s.items, device.multiprocessors))}));
    const int most = std::min(device.shared / resident - kReservedShared, device.shared_of_block);
    s.stages = std::min(most / s.stage_bytes, kMostStages);
    launch.run_with_shared("pooled_pointwise_kernel", pooled_pointwise_kernel<T, kOutputs>,
                           std::min<int64_t>(s.items, int64_t{device.multiprocessors} * resident),
                           ceil_div(s.outputs, s.weight_rows), warps * 32, s.stages * s.stage_bytes, Rows(in),
                           data_of<const T>(weight), data_of<const T>(bias), out.rows, s);
  };
  const auto with_outputs = [&](auto element) {
    out.columns > 32 ? run(element, std::integral_constant<int, 64>())
                     : run(element, std::integral_constant<int, 32>());
  };
  dtype_of("inception", "x", x) == DType::f16 ? with_outputs(f16_t{}) : with_outputs(bf16_t{});
}

}  // namespace fused_cnn
