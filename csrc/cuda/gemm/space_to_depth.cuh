// A convolution of stride 2 over few channels, such as the 7x7 of a network's stem over three, as one of stride 1 over
// enough for tensor cores: each 2 x 2 pixels become the 16 channels of one (arXiv 1809.04184 calls it space-to-depth),
// of which a window of 7 or 8 sees 4 x 4. Those beside each other are adjacent in memory, so that the implicit product
// takes the four of a row as 64 channels of one pixel, and the window is 4 x 1. What an odd window lacks of 4 x 4 are
// weights of zero: values that are not finite reach one pixel further than PyTorch's.
#pragma once
#include "cuda/gemm/tiles.h"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace fused_cnn {

constexpr int kDepth = 16;  // channels of a pixel: 2 x 2 x kMostStemInputs
constexpr int kDepthThreads = 256;

struct StemShape {
  int64_t stride[4];  // of x (N, C, H, W), in elements
  int inputs, height, width, padding[2], depth_height, depth_width;
};

// out[n, y, x, (i, j, c)] = x[n, c, 2 y + i - padding, 2 x + j - padding], zero outside: one thread a pixel of out.
template <typename T>
__global__ void __launch_bounds__(kDepthThreads)
    space_to_depth_kernel(const T* __restrict__ in, T* __restrict__ out, StemShape shape, int64_t pixels) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kDepthThreads + threadIdx.x;
  if (pixel >= pixels) return;
  const int64_t row = pixel / shape.depth_width, image = row / shape.depth_height;
  const int left = static_cast<int>(pixel - row * shape.depth_width) * 2 - shape.padding[1];
  const int top = static_cast<int>(row - image * shape.depth_height) * 2 - shape.padding[0];
  Vec8<T> values[2]{};
#pragma unroll
  for (int place = 0; place < 4; ++place) {
    const int y = top + place / 2, x = left + place % 2;
    if (y < 0 || y >= shape.height || x < 0 || x >= shape.width) continue;
    const T* from = in + image * shape.stride[0] + y * shape.stride[2] + x * shape.stride[3];
#pragma unroll
    for (int c = 0; c < kMostStemInputs; ++c) {
      constexpr int kHalf = 2 * kMostStemInputs;
      if (c < shape.inputs)
        values[place * kMostStemInputs / kHalf].v[(place * kMostStemInputs + c) % kHalf] = from[c * shape.stride[1]];
    }
  }
  store_vec8<true>(out + pixel * kDepth, values[0]);
  store_vec8<true>(out + pixel * kDepth + kVec, values[1]);
}

// out[o, a, b, (i, j, c)] = weight[o, c, 2 a + i, 2 b + j], zero outside: the window of the convolution above, for
// taps (a, b). weight is contiguous; one thread an element of out.
template <typename T>
__global__ void __launch_bounds__(kDepthThreads)
    stem_weight_kernel(const T* __restrict__ weight, T* __restrict__ out, int inputs, int height, int width, int taps_h,
                       int taps_w, int64_t count) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kDepthThreads + threadIdx.x;
  if (element >= count) return;
  const int c = element % kMostStemInputs, j = element / kMostStemInputs % 2, i = element / (2 * kMostStemInputs) % 2;
  int64_t rest = element / kDepth;
  const int b = static_cast<int>(rest % taps_w);
  rest /= taps_w;
  const int a = static_cast<int>(rest % taps_h);
  const int64_t o = rest / taps_h;
  const int y = 2 * a + i, x = 2 * b + j;
  const bool inside = c < inputs && y < height && x < width;
  out[element] = inside ? weight[((o * inputs + c) * height + y) * width + x] : T{};
}

}  // namespace fused_cnn
