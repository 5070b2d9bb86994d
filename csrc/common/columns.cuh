// Sums per channel over rows of channels, in a fixed order: how gradients of biases and BatchNorm's statistics and
// gradients are added up without atomics. A block takes a strip of channels and a chunk of the rows. Its threads are
// kLanes neighbouring vectors of channels by kThreads / kLanes rows, so that a warp reads whole lines; each adds up its
// own rows, the block adds its threads up through shared memory, and a second kernel adds the chunks up in order.
// Which rows belong together follows from the shape and from V, so from the dtype and from whether all lies on 16
// bytes.
#pragma once
#include "common/launch.cuh"
#include "common/rows.h"

namespace fused_cnn {

constexpr int kColumnThreads = 256;
constexpr int kRowsInFlight = 4;  // per thread: loads that are issued before the first is used

// V elements of T, loaded and stored at once; V is Vec<T>::size, or 1 for what is not on 16 bytes.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

// Threads of a block along the channels: 8 vectors of 16 bytes are a line of 128 bytes, as are 32 floats.
template <int V>
constexpr int kLanes = V == 1 ? 32 : 8;

// The rows' cut into chunks: enough blocks to fill any chip, enough rows in each to be worth their sums.
struct Columns {
  int64_t rows, chunks, strips;

  template <int V>
  static Columns of(int64_t rows, int64_t channels) {
    const int64_t strips = ceil_div<int64_t>(channels, V * kLanes<V>);
    const int64_t deep = ceil_div<int64_t>(rows, kColumnThreads / kLanes<V> * kRowsInFlight * 2);
    const int64_t wanted = ceil_div<int64_t>(1024, strips);
    return {rows, deep < wanted ? (deep > 1 ? deep : 1) : wanted, strips};
  }
};

// Where a thread works.
template <int V>
struct Place {
  int64_t channel, row, end;  // its first channel; its first row, and the end of its block's rows
  static constexpr int step = kColumnThreads / kLanes<V>;

  __device__ Place(int64_t rows)
      : channel((static_cast<int64_t>(blockIdx.x) * kLanes<V> + threadIdx.x % kLanes<V>)*V),
        row(rows * blockIdx.y / gridDim.y + threadIdx.x / kLanes<V>),
        end(rows * (blockIdx.y + 1) / gridDim.y) {}
};

// partial[chunk][channel] = the block's sums; called by every thread of the block.
template <int V, typename C>
__device__ void add_up_block(const C (&sums)[V], C* __restrict__ partial, int64_t channels, const Place<V>& place) {
  constexpr int kPitch = kColumnThreads + kLanes<V>;  // so that the elements of a lane lie in different banks
  __shared__ C shared[kPitch * V];
#pragma unroll
  for (int j = 0; j < V; ++j) shared[j * kPitch + threadIdx.x] = sums[j];
  __syncthreads();
  // Thread t finishes element t / kLanes of lane t % kLanes; for V = 1 that is the first kLanes threads.
  const int lane = threadIdx.x % kLanes<V>, element = threadIdx.x / kLanes<V>;
  if (element < V) {
    const int64_t channel = place.channel + element;
    C sum = 0;
    for (int row = 0; row < Place<V>::step; ++row) {
      sum += shared[element * kPitch + row * kLanes<V> + lane];
    }
    if (channel < channels) partial[blockIdx.y * channels + channel] = sum;
  }
  __syncthreads();  // the array may be used again
}

// out[c] = the sum of partial[chunk][c] over the chunks, in order: a block takes 32 channels, and cuts the chunks
// into 8.
template <typename C>
__global__ void __launch_bounds__(kColumnThreads)
    add_up_chunks_kernel(const C* __restrict__ partial, int64_t chunks, int64_t channels, C* __restrict__ out) {
  constexpr int kParts = kColumnThreads / 32;
  __shared__ double shared[kParts][32];
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  double sum = 0;
  if (c < channels) {
#pragma unroll 8
    for (int64_t chunk = chunks * part / kParts; chunk < chunks * (part + 1) / kParts; ++chunk) {
      sum += partial[chunk * channels + c];
    }
  }
  shared[part][lane] = sum;
  __syncthreads();
  if (part > 0 || c >= channels) return;
  for (int i = 1; i < kParts; ++i) sum += shared[i][lane];
  out[c] = static_cast<C>(sum);
}

}  // namespace fused_cnn
