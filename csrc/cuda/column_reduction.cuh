// Rows of channels on CUDA, and sums per channel over them in a fixed order: how every kernel with per-channel vectors
// walks its activations, and how the gradients of biases and BatchNorm's statistics and gradients are reduced without
// atomics.
//
// The grid is (channel tiles of all branches, chunks of rows). A block of 256 threads works on a tile of up to 64
// channels of one branch and one chunk of the rows. A thread keeps the vectors of 8 adjacent channels in registers and
// goes through every step-th row. Neighbouring threads take neighbouring channels, then neighbouring rows, so that a
// warp moves whole lines. A block reduces its threads' sums through shared memory, and a second kernel reduces the
// chunks' sums in order. Which rows belong together follows from the shape alone.
#pragma once
#include <algorithm>
#include <type_traits>
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "shared/rows.h"

namespace fused_cnn {

constexpr int kColumnThreads = 256;
constexpr int kTileVecs = 8;
constexpr int kTileChannels = kVec * kTileVecs;
constexpr int64_t kDenseWidth = kTileChannels;  // of a row of dense memory that has no channels (shared/passes.h)

// Rows that a thread loads of so many tensors before it uses the first: at least three loads of 16 bytes, in few enough
// registers for kBlocksPerSm blocks on a multiprocessor.
template <typename T, int kTensors>
constexpr int kInFlight = std::max<int>(1, 8 / sizeof(T) >> (kTensors - 1));
template <typename T, bool kAligned>
constexpr int kBlocksPerSm = kAligned && sizeof(T) < 8 ? 2 : 1;

// What one launch works on: branches of a concatenation, which share their rows. B has `channels`.
constexpr int kBranches = 8;
template <typename B>
struct BranchList {
  B branch[kBranches];
};

constexpr int64_t channel_tiles(int64_t channels) {
  return ceil_div<int64_t>(channels, kTileChannels);
}

template <typename Branches>
int64_t count_tiles(const Branches& branches) {
  int64_t tiles = 0;
  for (const auto& branch : branches) tiles += channel_tiles(branch.channels);
  return tiles;
}

// The cut of the rows into chunks of `size`, of which the last may be smaller.
struct RowChunks {
  int64_t rows, size, count;

  // Enough blocks to fill any chip, enough rows in each to be worth their sums.
  template <typename B>
  static RowChunks of(int64_t rows, const std::vector<B>& branches) {
    const int64_t blocks = ceil_div<int64_t>(1024, std::max<int64_t>(count_tiles(branches), 1));
    const int64_t size = std::max<int64_t>(128, ceil_div(rows, blocks));
    return {.rows = rows, .size = size, .count = std::max<int64_t>(1, ceil_div(rows, size))};
  }
  __device__ int64_t begin(int64_t chunk) const { return chunk * size; }
  __device__ int64_t end(int64_t chunk) const { return (chunk + 1) * size < rows ? (chunk + 1) * size : rows; }
  __device__ int64_t length(int64_t chunk) const { return end(chunk) - begin(chunk); }
};

template <typename B>
std::vector<BranchList<B>> branch_lists(const std::vector<B>& branches) {
  std::vector<BranchList<B>> lists(ceil_div<size_t>(branches.size(), kBranches));
  for (size_t i = 0; i < branches.size(); ++i) lists[i / kBranches].branch[i % kBranches] = branches[i];
  return lists;
}

// kernel(list, chunks, arguments...) on the tiles of the branches and the chunks of their rows, kBranches a launch.
template <typename B, typename... Parameters, typename... Arguments>
void launch_columns(const Launch& launch, const char* name, void (*kernel)(BranchList<B>, RowChunks, Parameters...),
                    const std::vector<B>& branches, const RowChunks& chunks, const Arguments&... arguments) {
  for (const BranchList<B>& list : branch_lists(branches)) {
    launch.run(name, kernel, count_tiles(list.branch), chunks.count, kColumnThreads, list, chunks, arguments...);
  }
}

// What a thread works on: its n channels from `channel` on, and every step-th row from `row` to `end`. A thread past
// the last channel has no channels and no rows; its `channel` is one that may be read.
template <typename B>
struct ThreadTile {
  const B* branch;
  int64_t channel, row, end;
  int n, vecs, step;  // threads of the block along the channels, and along the rows

  __device__ ThreadTile(const BranchList<B>& list, const RowChunks& chunks) {
    int index = 0;
    int64_t tile = blockIdx.x;
    for (;; ++index) {
      const int64_t tiles = channel_tiles(list.branch[index].channels);
      if (tile < tiles) break;
      tile -= tiles;
    }
    branch = &list.branch[index];
    const int64_t left = list.branch[index].channels - tile * kTileChannels;
    vecs = left > 32 ? 8 : left > 16 ? 4 : left > 8 ? 2 : 1;
    step = kColumnThreads / vecs;
    const int64_t mine = left - threadIdx.x % vecs * kVec;  // channels from this thread's first on
    n = static_cast<int>(mine < 0 ? 0 : mine < kVec ? mine : kVec);
    channel = tile * kTileChannels + (n > 0 ? threadIdx.x % vecs * kVec : 0);
    end = chunks.end(blockIdx.y);
    row = n > 0 ? chunks.begin(blockIdx.y) + threadIdx.x / vecs : end;
  }
};

// load(u, row), then use(u, row), for this thread's rows, kCount at a time.
template <int kCount, typename B, typename Load, typename Use>
__device__ void for_rows(const ThreadTile<B>& tile, const Load& load, const Use& use) {
  for (int64_t row = tile.row; row < tile.end; row += static_cast<int64_t>(tile.step) * kCount) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int64_t r = row + u * tile.step;
      if (r < tile.end) load(u, r);
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int64_t r = row + u * tile.step;
      if (r < tile.end) use(u, r);
    }
  }
}

// Sums what the threads of the block hold, for each of its channels: one thread a channel calls done(channel, sum).
// Every thread of the block calls this.
template <typename C, typename B, typename Done>
__device__ void block_reduce_columns(const C (&values)[kVec], const ThreadTile<B>& tile, const Done& done) {
  constexpr int kPitch = kColumnThreads + kVec;  // so that the elements of a vector lie in different banks
  __shared__ C shared[kVec * kPitch];
  __shared__ C partial[kColumnThreads];
#pragma unroll
  for (int j = 0; j < kVec; ++j) shared[j * kPitch + threadIdx.x] = values[j];
  __syncthreads();
  // Thread t sums 8 rows of one channel, and the first threads sum these partial sums.
  const int vec = threadIdx.x % tile.vecs, element = threadIdx.x / tile.vecs % kVec;
  const int columns = tile.vecs * kVec, part = threadIdx.x / columns;
  C sum = 0;
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum += shared[element * kPitch + (part * kVec + i) * tile.vecs + vec];
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < columns) {
    for (int p = 1; p < kColumnThreads / columns; ++p) sum += partial[p * columns + threadIdx.x];
    if (element < tile.n) done(tile.channel + element, sum);
  }
  __syncthreads();  // the arrays may be used again
}

// The second stage, which reduces the chunks: a block works on 32 channels, one a lane, and its warps share the chunks.
constexpr int kReduceWarps = 16;
constexpr int kReduceThreads = 32 * kReduceWarps;

template <typename... Parameters, typename... Arguments>
void launch_reduce(const Launch& launch, const char* name, void (*kernel)(Parameters...), int64_t channels,
                   const Arguments&... arguments) {
  launch.run(name, kernel, ceil_div<int64_t>(channels, 32), 1, kReduceThreads, arguments...);
}

__device__ inline int64_t reduce_channel() {
  return static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
}

// The sum over the block's warps, lane by lane, for each of them. Its memory is there once for all terms that are
// summed.
__device__ inline double reduce_warps(double value) {
  __shared__ double shared[kReduceWarps][32];
  shared[threadIdx.x / 32][threadIdx.x % 32] = value;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kReduceWarps; ++i) sum += shared[i][threadIdx.x % 32];
  __syncthreads();
  return sum;
}

// The sum of term(chunk) over the chunks, of a thread's reduce_channel() where that is `inside` the tensor. Every
// thread of the block calls this.
template <typename Term>
__device__ double reduce_chunks(int64_t chunks, bool inside, const Term& term) {
  const int64_t end = chunks * (threadIdx.x / 32 + 1) / kReduceWarps;
  double sum = 0;
  if (inside) {
#pragma unroll 4
    for (int64_t i = chunks * (threadIdx.x / 32) / kReduceWarps; i < end; ++i) sum += term(i);
  }
  return reduce_warps(sum);
}

}  // namespace fused_cnn
