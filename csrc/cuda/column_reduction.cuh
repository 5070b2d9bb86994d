// Rows of channels on CUDA, and sums per channel over them in a fixed order: how every kernel with per-channel vectors
// walks its activations, and how gradients of biases and BatchNorm's statistics and gradients are added up without
// atomics.
//
// A block takes a strip of up to 64 channels of one branch, and a chunk of the rows. A thread takes an octet: 8
// adjacent channels, whose vectors it keeps in registers, of every step-th row. Neighbouring threads take neighbouring
// octets, then neighbouring rows, so that a warp moves whole lines. The block adds its threads up through shared
// memory, and a second kernel adds the chunks up in order. Which rows belong together follows from the shape alone.
#pragma once
#include <algorithm>
#include <type_traits>
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "shared/rows.h"

namespace fused_cnn {

constexpr int kColumnThreads = 256;
constexpr int kStripOctets = 8;
constexpr int kStrip = kOctet * kStripOctets;

// Rows that a thread loads of so many tensors before it uses the first: at least three loads of 16 bytes, in few enough
// registers for kBlocks blocks on a multiprocessor.
template <typename T, int kTensors>
constexpr int kInFlight = std::max<int>(1, 8 / sizeof(T) >> (kTensors - 1));
template <typename T, bool kVectors>
constexpr int kBlocks = kVectors && sizeof(T) < 8 ? 2 : 1;

// Whether rows of octets at `data` can move 16 bytes at a time.
inline bool on_vectors(const void* data, int64_t pitch, int64_t element_size) {
  return aligned16(data) && pitch * element_size % 16 == 0;
}

// What one launch works on: branches of a concatenation, which share their rows. B has `channels`.
constexpr int kBranches = 8;
template <typename B>
struct BranchList {
  B branch[kBranches];
};

inline int64_t strips_of(int64_t channels) {
  return ceil_div<int64_t>(channels, kStrip);
}

// body(list, strips) for the branches, kBranches at a time.
template <typename B, typename Body>
void in_lists(const std::vector<B>& branches, const Body& body) {
  for (size_t begin = 0; begin < branches.size(); begin += kBranches) {
    BranchList<B> list{};
    int64_t strips = 0;
    for (size_t i = begin; i < std::min(branches.size(), begin + kBranches); ++i) {
      list.branch[i - begin] = branches[i];
      strips += strips_of(branches[i].channels);
    }
    if (strips > 0) body(list, strips);
  }
}

// The cut of the rows into chunks of `size`, of which the last may be smaller.
struct Chunks {
  int64_t rows, size, count;

  // Enough blocks to fill any chip, enough rows in each to be worth their sums.
  template <typename B>
  static Chunks of(int64_t rows, const std::vector<B>& branches) {
    int64_t strips = 0;
    for (const B& branch : branches) strips += strips_of(branch.channels);
    const int64_t blocks = ceil_div<int64_t>(1024, std::max<int64_t>(strips, 1));
    const int64_t size = std::max<int64_t>(128, ceil_div(rows, blocks));
    return {rows, size, std::max<int64_t>(1, ceil_div(rows, size))};
  }
  __device__ int64_t begin(int64_t chunk) const { return chunk * size; }
  __device__ int64_t end(int64_t chunk) const { return (chunk + 1) * size < rows ? (chunk + 1) * size : rows; }
  __device__ int64_t length(int64_t chunk) const { return end(chunk) - begin(chunk); }
};

// Where a thread works: its n channels from `channel` on, and every step-th row from `row` to `end`. A thread past the
// last channel has no channels and no rows; its `channel` is one that may be read.
struct Place {
  int64_t channel, row, end;
  int n, octets, step;  // threads of the block along the channels, and along the rows

  __device__ Place(int64_t channels, int64_t strip, const Chunks& chunks) {
    const int64_t left = channels - strip * kStrip;
    octets = left > 32 ? 8 : left > 16 ? 4 : left > 8 ? 2 : 1;
    step = kColumnThreads / octets;
    const int64_t mine = left - threadIdx.x % octets * kOctet;  // channels from this thread's first on
    n = static_cast<int>(mine < 0 ? 0 : mine < kOctet ? mine : kOctet);
    channel = strip * kStrip + (n > 0 ? threadIdx.x % octets * kOctet : 0);
    end = chunks.end(blockIdx.y);
    row = n > 0 ? chunks.begin(blockIdx.y) + threadIdx.x / octets : end;
  }
};

// The branch of this block and where its threads work.
template <typename B>
struct BranchPlace : Place {
  const B& branch;

  __device__ BranchPlace(const BranchList<B>& list, const Chunks& chunks) : BranchPlace(list, chunks, find(list)) {}

 private:
  struct Found {
    int index;
    int64_t strip;
  };
  __device__ static Found find(const BranchList<B>& list) {
    Found found{0, blockIdx.x};
    for (;; ++found.index) {
      const int64_t strips = (list.branch[found.index].channels + kStrip - 1) / kStrip;
      if (found.strip < strips) return found;
      found.strip -= strips;
    }
  }
  __device__ BranchPlace(const BranchList<B>& list, const Chunks& chunks, Found found)
      : Place(list.branch[found.index].channels, found.strip, chunks), branch(list.branch[found.index]) {}
};

// load(u, row), then use(u, row), for this thread's rows, kCount at a time.
template <int kCount, typename Load, typename Use>
__device__ void for_rows(const Place& place, const Load& load, const Use& use) {
  for (int64_t row = place.row; row < place.end; row += static_cast<int64_t>(place.step) * kCount) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int64_t r = row + u * place.step;
      if (r < place.end) load(u, r);
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int64_t r = row + u * place.step;
      if (r < place.end) use(u, r);
    }
  }
}

// Adds up what the threads of the block hold, for each of its channels: one thread a channel calls done(channel, sum).
// Every thread of the block calls this.
template <typename C, typename Done>
__device__ void add_up_block(const C (&values)[kOctet], const Place& place, const Done& done) {
  constexpr int kPitch = kColumnThreads + kOctet;  // so that the elements of an octet lie in different banks
  __shared__ C shared[kOctet * kPitch];
  __shared__ C parts[kColumnThreads];
#pragma unroll
  for (int j = 0; j < kOctet; ++j) shared[j * kPitch + threadIdx.x] = values[j];
  __syncthreads();
  // Thread t adds up 8 rows of one channel, and the first threads the parts.
  const int octet = threadIdx.x % place.octets, element = threadIdx.x / place.octets % kOctet;
  const int columns = place.octets * kOctet, part = threadIdx.x / columns;
  C sum = 0;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) sum += shared[element * kPitch + (part * kOctet + i) * place.octets + octet];
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < columns) {
    for (int p = 1; p < kColumnThreads / columns; ++p) sum += parts[p * columns + threadIdx.x];
    if (element < place.n) done(place.channel + element, sum);
  }
  __syncthreads();  // the arrays may be used again
}

// The second stage: a block of kChunkThreads takes 32 channels, and cuts the chunks into kParts.
constexpr int kParts = 16;
constexpr int kChunkThreads = 32 * kParts;

struct ChunkPlace {
  int64_t channel, chunk, end;
  bool first;  // this thread has the sum

  __device__ explicit ChunkPlace(int64_t chunks)
      : channel(static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32),
        chunk(chunks * (threadIdx.x / 32) / kParts),
        end(chunks * (threadIdx.x / 32 + 1) / kParts),
        first(threadIdx.x < 32) {}
};

// The sum of the threads of one channel, for each of them.
__device__ inline double add_up_parts(double value) {
  __shared__ double shared[kParts][32];
  shared[threadIdx.x / 32][threadIdx.x % 32] = value;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kParts; ++i) sum += shared[i][threadIdx.x % 32];
  __syncthreads();
  return sum;
}

}  // namespace fused_cnn
