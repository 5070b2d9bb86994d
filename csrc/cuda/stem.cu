// The stem of a network in one kernel. In channels_last the 7 pixels x C channels that a row of the window covers are
// adjacent values; an eighth pixel, before or behind them, whose weights are zero, makes them begin on 4 bytes and be C
// times 8 of the product's inner dimension: a convolution over 3 channels has 7 x 24 of it, not the 392 that cuDNN pads
// it to. Values that are not finite reach one pixel further in a row than PyTorch's. What the convolution gives is
// never written where a pool follows.
//
// A persistent block takes bands of an image: rows of x stand in a ring in shared memory, which the rows that come next
// fill while tensor cores are at work. A warp has 16 pixels of a convolution's row and 32 of its 64 outputs, whose
// weights stay in its registers: each value of x is read from shared memory once a warp, by loads that meet no bank
// twice (a pixel's values begin C words behind its neighbour's). The pool's maximum over rows is taken in registers,
// that over columns when neighbouring pixels have met in shared memory, from where 16 bytes a thread go out.
#include "cuda/stem.h"
#include <limits>
#include "cuda/launch.cuh"
#include "cuda/maxima.cuh"
#include "cuda/mma.cuh"

namespace fused_cnn {
namespace {

constexpr int kOutputs = 64;    // of a block, by two warps
constexpr int kPixels = 16;     // of a warp
constexpr int kMostGroups = 7;  // of such pixels, beside each other in a block
constexpr int kMostThreads = 2 * kMostGroups * 32;
constexpr int kRing = 16;                  // rows of x
constexpr int kMargin = 8;                 // pixels of x in a row of the ring before the tile's first
constexpr int kRowOutputs = kOutputs + 8;  // of a pixel in shared memory: rows of a fragment in banks of their own

struct Stem {
  int64_t x_stride[4], weight_stride[4];  // in elements
  int height, width, conv_height, conv_width, out_height, out_width, outputs;
  int padding[2], pool_padding;
  bool relu, wide_loads;  // 16 bytes at a time: pixels are adjacent in a row of x, which lies on 16 bytes
  // Tiles: so many of a block's groups of pixels; results in a tile's row, of which the first belongs to column
  // `lead` of the convolution's, and rows in a band.
  int groups, tile_width, lead, tiles, band, bands;
  int items;  // images x bands x tiles
};

template <int kInputs>
struct Depth {
  static constexpr int kEights = kStemKernel * kInputs;  // of the inner dimension
  // Bytes of a ring's row: what the windows of a tile's pixels cover, in whole vectors.
  static constexpr int vectors(int groups) { return (4 * groups + 2) * kInputs; }
  static constexpr int ring_bytes(int groups) { return kRing * vectors(groups) * 16; }
  static constexpr int result_bytes(int groups) { return groups * kPixels * kRowOutputs * 2; }
  static constexpr int weight_bytes() { return kOutputs * 8 * kEights * 2; }
  // The weights stand in shared memory before all else does.
  static constexpr int bytes(int groups) {
    const int rows = ring_bytes(groups) + 2 * result_bytes(groups), weights = weight_bytes();
    return kOutputs * 4 + (rows > weights ? rows : weights);
  }
};

// Grid (blocks, outputs / 64), 64 threads a group of pixels.
template <typename T, int kInputs, bool kPool>
__global__ void __launch_bounds__(kMostThreads, 1)
    stem_kernel(const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias, Rows out,
                const __grid_constant__ Stem s) {
  using D = Depth<kInputs>;
  FUSED_CNN_DYNAMIC_SHARED(memory, D::bytes(kMostGroups));
  float* const biases = reinterpret_cast<float*>(memory);
  unsigned char* const ring = memory + kOutputs * sizeof(float);
  T* const staged = reinterpret_cast<T*>(ring);
  const int vectors = D::vectors(s.groups), row_bytes = vectors * 16;
  unsigned char* const results = ring + kRing * row_bytes;
  const int threads = blockDim.x, thread = threadIdx.x, warp = thread / 32;
  const int group = warp % s.groups, outputs = warp / s.groups * 32;  // of the block's
  const int pixel = thread % 32 / 4, q = thread % 4;                  // of the fragment
  const int first_output = blockIdx.y * kOutputs;

  for (int i = thread; i < kOutputs; i += threads) {
    biases[i] = bias && first_output + i < s.outputs ? to_compute(bias[first_output + i]) : 0.0f;
  }
  for (int i = thread; i < kOutputs * 8 * D::kEights; i += threads) {
    const int output = first_output + i / (8 * D::kEights), k = i % (8 * D::kEights), row = k / (8 * kInputs);
    const int column = k % (8 * kInputs) / kInputs - s.padding[1] % 2, channel = k % (8 * kInputs) % kInputs;
    const bool inside = output < s.outputs && column >= 0 && column < kStemKernel;
    staged[i] = inside ? weight[output * s.weight_stride[0] + channel * s.weight_stride[1] + row * s.weight_stride[2] +
                                column * s.weight_stride[3]]
                       : T{};
  }
  __syncthreads();
  uint32_t weights[D::kEights][4];
#pragma unroll
  for (int eight = 0; eight < D::kEights; ++eight) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const T* from = staged + (outputs + 8 * j + pixel) * 8 * D::kEights + 8 * eight + 2 * q;
      weights[eight][j] = *reinterpret_cast<const uint32_t*>(from);
    }
  }
  __syncthreads();

  // Where this thread's windows begin in a row of the ring, in bytes.
  const int window = kStemStride * (kPixels * group + pixel) + kMargin - ceil_div(s.padding[1], 2) * 2;
  const int own = (window * kInputs + 2 * q) * 2;
  const int own_row = thread / vectors, own_vector = thread % vectors;  // of those that are loaded
  for (int64_t item = blockIdx.x; item < s.items; item += gridDim.x) {
    const int which = static_cast<int>(item), tile = which % s.tiles, band = which / s.tiles % s.bands;
    const int image = which / s.tiles / s.bands;
    const int first_row = band * s.band, rows = std::min(s.band, s.out_height - first_row);
    const int first_column = tile * s.tile_width, columns = std::min(s.tile_width, s.out_width - first_column);
    const int conv_row = kPool ? kStemPoolStride * first_row - s.pool_padding : first_row;
    const int conv_column = kPool ? kStemPoolStride * first_column - s.lead : first_column;  // of the tile's first
    const int x_row = kStemStride * conv_row - s.padding[0];
    const T* const pixels = x + int64_t{image} * s.x_stride[0];

    // Rows of x into the ring, zeros for those outside.
    const auto load_rows = [&](int first, int count) {
      int row = first + own_row, vector = own_vector;
      for (int i = thread; i < count * vectors; i += threads) {
        if (!kPool || i != thread) {  // without a pool there are no registers to spare for it
          row = first + i / vectors;
          vector = i % vectors;
        }
        unsigned char* const to = ring + (row & (kRing - 1)) * row_bytes + vector * 16;
        const int64_t at = int64_t{kStemStride * conv_column - kMargin} * kInputs + vector * 8;  // in the row of x
        const bool row_inside = row >= 0 && row < s.height;
        if (s.wide_loads) {
          const bool inside = row_inside && at >= 0 && at < int64_t{s.width} * kInputs;
          copy_16_async(to, inside ? pixels + row * s.x_stride[2] + at : x, inside);
        } else {
          Vec8<T> values{};
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const int column = kStemStride * conv_column - kMargin + (vector * 8 + e) / kInputs;
            if (row_inside && column >= 0 && column < s.width) {
              values.v[e] =
                  pixels[(vector * 8 + e) % kInputs * s.x_stride[1] + row * s.x_stride[2] + column * s.x_stride[3]];
            }
          }
          *reinterpret_cast<Vec8<T>*>(to) = values;
        }
      }
    };
    // A row of the convolution: this thread's pairs of outputs, of pixel and pixel + 8, of every 8 outputs.
    const auto convolve = [&](int row, uint32_t (&pairs)[4][2]) {
      if (row < 0 || row >= s.conv_height) {
#pragma unroll
        for (int j = 0; j < 4; ++j) pairs[j][0] = pairs[j][1] = 0;
        return;
      }
      float sums[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[j][i] = biases[outputs + 8 * j + 2 * q + i % 2];
      }
      const int top = kStemStride * row - s.padding[0];
      const auto load = [&](int eight, uint32_t (&rows)[2]) {
        const unsigned char* const from =
            ring + ((top + eight / kInputs) & (kRing - 1)) * row_bytes + own + eight % kInputs * 16;
        rows[0] = *reinterpret_cast<const uint32_t*>(from);
        rows[1] = *reinterpret_cast<const uint32_t*>(from + 8 * kStemStride * kInputs * 2);
      };
#pragma unroll
      for (int eight = 0; eight + 1 < D::kEights; eight += 2) {
        uint32_t a[2][2];
        load(eight, a[0]);
        load(eight + 1, a[1]);
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_add<T, 2>(sums[j], a, {weights[eight][j], weights[eight + 1][j]});
      }
      if constexpr (D::kEights % 2 == 1) {
        uint32_t a[1][2];
        load(D::kEights - 1, a[0]);
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_add<T, 1>(sums[j], a, {weights[D::kEights - 1][j]});
      }
      // Under a pool ReLU is the pool's: a maximum with zero.
      const float lowest = !kPool && s.relu ? 0.0f : -std::numeric_limits<float>::infinity();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float both[] = {sums[j][2 * i], sums[j][2 * i + 1]};
          if constexpr (!kPool) {
#pragma unroll
            for (float& sum : both) sum = sum <= lowest ? lowest : sum;
          }
          pairs[j][i] = pair_of<T>(both[0], both[1]);
        }
      }
    };
    // A step of the convolution's rows makes one of the result's; a pool's first row also needs the one before.
    constexpr int kRowsAStep = kPool ? kStemPoolStride : 1, kNewRows = kRowsAStep * kStemStride;
    constexpr int kBefore = kPool ? 1 : 0, kFirstRows = kStemKernel + kBefore * kNewRows;
    load_rows(x_row, kFirstRows);
    await_copies();
    __syncthreads();
    const int lowest_column = std::max(0, -conv_column), highest_column = s.conv_width - 1 - conv_column;
    uint32_t best[4][2];
#pragma unroll 1
    for (int r = 0; r < kRowsAStep * rows + kBefore; ++r) {
      const int step = (r - kBefore) / kRowsAStep;  // the row of the result, of the band
      if (r >= kBefore && (r - kBefore) % kRowsAStep == 0 && step + 1 < rows) {
        load_rows(x_row + kFirstRows + kNewRows * step, kNewRows);
      }
      uint32_t pairs[4][2];
      convolve(conv_row + r, pairs);
      const bool first = !kPool || r == 0, finished = !kPool || (r > 0 && r % kStemPoolStride == 0);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) best[j][h] = first ? pairs[j][h] : max_of_pairs<T>(best[j][h], pairs[j][h]);
      }
      if (!finished) continue;
      T* const row = reinterpret_cast<T*>(results + step % 2 * D::result_bytes(s.groups));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          T* const to = row + (kPixels * group + pixel + 8 * h) * kRowOutputs + outputs + 8 * j + 2 * q;
          *reinterpret_cast<uint32_t*>(to) = best[j][h];
          best[j][h] = pairs[j][h];  // of the row that two windows share
        }
      }
      await_copies();
      __syncthreads();
      const int64_t first_result = (int64_t{image} * s.out_height + first_row + step) * s.out_width + first_column;
      for (int v = thread; v < columns * (kOutputs / kVec); v += threads) {
        const int column = v / (kOutputs / kVec), output = v % (kOutputs / kVec) * kVec;
        if (first_output + output >= s.outputs) continue;
        Vec8<T> value;
        if constexpr (kPool) {
          Maxima<T> largest;
          largest.take(Vec8<T>{});
          const int first = kStemPoolStride * column - s.pool_padding + s.lead;
#pragma unroll
          for (int d = 0; d < kStemPoolKernel; ++d) {  // a column outside is the window's next inside
            const int at = std::min(std::max(first + d, lowest_column), highest_column);
            largest.take(load_vec8<true>(row + at * kRowOutputs + output));
          }
          value = largest.result();
        } else {
          value = load_vec8<true>(row + column * kRowOutputs + output);
        }
        store_vec8<true>(out.at<T>(first_result + column) + first_output + output, value);
      }
    }
    __syncthreads();  // the next item's rows go where this one's are read
  }
}

int64_t blocks_at_once(const Stem& s, int multiprocessors) {
  return int64_t{multiprocessors} * (kMostThreads / (64 * s.groups));
}

// How wide tiles are and how long bands, so that the multiprocessors are done soonest: each is at one band after the
// other, and a band costs some rows more than it has.
void split(Stem& s, bool pooled, int64_t images, int multiprocessors) {
  constexpr int kMostPixels = kPixels * kMostGroups, kLead = 4;
  const int conv_width = s.conv_width;
  if (!pooled) {
    s.tiles = ceil_div(conv_width, kMostPixels);
    s.groups = ceil_div(ceil_div(conv_width, s.tiles), kPixels);
    s.tile_width = s.groups * kPixels;
    s.tiles = ceil_div(conv_width, s.tile_width);
  } else if (conv_width <= kMostPixels) {
    s.tiles = 1;
    s.groups = ceil_div(conv_width, kPixels);
    s.tile_width = s.out_width;
  } else {  // even, so that each tile's pixels of x begin on 16 bytes
    s.lead = kLead;
    const int most = (kMostPixels - kLead - kStemPoolKernel + kStemPoolStride) / kStemPoolStride / 2 * 2;
    s.tile_width = ceil_div(ceil_div(s.out_width, ceil_div(s.out_width, most)), 2) * 2;
    s.tiles = ceil_div(s.out_width, s.tile_width);
    s.groups = ceil_div(kStemPoolStride * (s.tile_width - 1) + kStemPoolKernel + kLead, kPixels);
  }
  constexpr int kExtraRows = 3;  // of the convolution, a band: the row that it shares, and loads that nothing hides
  int64_t least = std::numeric_limits<int64_t>::max();
  constexpr int kMostBands = 1 << 10;  // to choose from
  for (int bands = 1; bands <= std::min(s.out_height, kMostBands); ++bands) {
    const int band = ceil_div(s.out_height, bands);
    if (ceil_div(s.out_height, band) != bands) continue;
    const int64_t turns = ceil_div<int64_t>(images * s.tiles * bands, blocks_at_once(s, multiprocessors));
    const int64_t cost = turns * (band * (pooled ? kStemPoolStride : 1) + kExtraRows);
    if (cost < least) {
      least = cost;
      s.band = band;
      s.bands = bands;
    }
  }
  s.items = static_cast<int>(images * s.tiles * s.bands);
}

}  // namespace

void run_stem(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Pair& padding, bool relu,
              const std::array<int64_t, 2>& size, const std::optional<StemPool>& pool, const Rows& out) {
  const int inputs = static_cast<int>(x.size(1));
  Stem s{.height = static_cast<int>(x.size(2)),
         .width = static_cast<int>(x.size(3)),
         .conv_height = static_cast<int>(size[0]),
         .conv_width = static_cast<int>(size[1]),
         .out_height = static_cast<int>(pool ? pool->height : size[0]),
         .out_width = static_cast<int>(pool ? pool->width : size[1]),
         .outputs = static_cast<int>(weight.size(0)),
         .padding = {static_cast<int>(padding[0]), static_cast<int>(padding[1])},
         .pool_padding = pool ? pool->padding : 0,
         .relu = relu,
         .wide_loads = aligned16(x.data_ptr()) && (inputs == 1 || x.stride(1) == 1) && x.stride(3) == inputs &&
                       x.stride(2) % 8 == 0 && x.stride(0) % 8 == 0 && x.size(3) * inputs % 8 == 0};
  for (int i = 0; i < 4; ++i) {
    s.x_stride[i] = x.stride(i);
    s.weight_stride[i] = weight.stride(i);
  }
  int multiprocessors = 0;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, x.get_device_index());
  FUSED_CNN_CHECK(multiprocessors > 0, "CUDA device ", x.get_device_index(), " has no multiprocessors");
  split(s, pool.has_value(), x.size(0), multiprocessors);
  const int threads = s.groups * 64;
  const int64_t blocks = std::min<int64_t>(s.items, blocks_at_once(s, multiprocessors));
  const Launch launch(x);
  const auto run = [&](auto element, auto channels, auto pooled) {
    using T = decltype(element);
    launch.run_with_shared("stem_kernel", stem_kernel<T, channels, pooled>, blocks, ceil_div(s.outputs, kOutputs),
                           threads, Depth<channels>::bytes(s.groups), data_of<const T>(x), data_of<const T>(weight),
                           bias ? data_of<const T>(*bias) : nullptr, out, s);
  };
  const auto with_pool = [&](auto element, auto channels) {
    pool ? run(element, channels, std::true_type()) : run(element, channels, std::false_type());
  };
  const auto with_channels = [&](auto element) {
    switch (inputs) {
      case 1:
        return with_pool(element, std::integral_constant<int, 1>());
      case 2:
        return with_pool(element, std::integral_constant<int, 2>());
      default:
        return with_pool(element, std::integral_constant<int, 3>());
    }
  };
  dtype_of("stem", "x", x) == DType::f16 ? with_channels(f16_t{}) : with_channels(bf16_t{});
}

}  // namespace fused_cnn
