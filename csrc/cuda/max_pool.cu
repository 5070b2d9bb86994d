// The kernel of cuda/max_pool.h.
#include "cuda/max_pool.h"
#include <algorithm>
#include <limits>
#include "cuda/launch.cuh"
#include "cuda/maxima.cuh"

namespace fused_cnn {
namespace {

constexpr int kPoolThreads = 256;
constexpr int kPoolRun = 4;  // results beside each other in a thread, whose windows share what is loaded

struct PoolShape {
  int channels, height, width, out_height, out_width;
};

// A thread takes a run of results of one row and 8 channels: neighbouring threads neighbouring channels, so that a warp
// moves whole lines. kKernel and kStride are the window's, both ways, without dilation; 0: any. x is read from memory
// once, its overlaps from the caches; the copy's bandwidth is the limit.
template <typename T, bool kAligned, int kKernel, int kStride>
__global__ void __launch_bounds__(kPoolThreads)
    max_pool_kernel(Rows x, Rows out, PoolShape shape, PoolWindow window, int64_t threads) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kPoolThreads + threadIdx.x;
  if (thread >= threads) return;
  const int vecs = ceil_div(shape.channels, kVec), runs = ceil_div(shape.out_width, kPoolRun);
  int64_t rest = thread / vecs;
  const int channel = static_cast<int>(thread - rest * vecs) * kVec, left_over = shape.channels - channel;
  const int n = left_over < kVec ? left_over : kVec;
  const int first = static_cast<int>(rest % runs) * kPoolRun;
  rest /= runs;
  const int y = static_cast<int>(rest % shape.out_height);
  const int64_t image = rest / shape.out_height;
  const int kernel_h = kKernel ? kKernel : window.kernel[0], kernel_w = kKernel ? kKernel : window.kernel[1];
  const int stride_h = kStride ? kStride : window.stride[0], stride_w = kStride ? kStride : window.stride[1];
  const int dilation_h = kKernel ? 1 : window.dilation[0], dilation_w = kKernel ? 1 : window.dilation[1];
  const int64_t top = int64_t{y} * stride_h - window.padding[0], left = int64_t{first} * stride_w - window.padding[1];

  Maxima<T> best[kPoolRun];
  const Vec8<T> lowest = Maxima<T>().result();
#pragma unroll
  for (int i = 0; i < kernel_h; ++i) {
    const int64_t in_y = top + int64_t{i} * dilation_h;
    if (in_y < 0 || in_y >= shape.height) continue;
    const int64_t row = (image * shape.height + in_y) * shape.width;
    const auto load = [&](int64_t in_x) { return load_vec8<kAligned>(x.at<const T>(row + in_x) + channel, n); };
    if constexpr (kKernel > 0) {
      constexpr int kSpan = (kPoolRun - 1) * kStride + kKernel;
      Vec8<T> values[kSpan];  // all on their way before the first is used
#pragma unroll
      for (int c = 0; c < kSpan; ++c) {
        values[c] = lowest;
        if (left + c >= 0 && left + c < shape.width) values[c] = load(left + c);
      }
#pragma unroll
      for (int c = 0; c < kSpan; ++c) {
#pragma unroll
        for (int r = 0; r < kPoolRun; ++r) {
          if (r * kStride <= c && c < r * kStride + kKernel) best[r].take(values[c]);
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < kPoolRun; ++r) {
        for (int c = 0; c < kernel_w; ++c) {
          const int64_t in_x = left + int64_t{r} * stride_w + int64_t{c} * dilation_w;
          if (in_x >= 0 && in_x < shape.width) best[r].take(load(in_x));
        }
      }
    }
  }
  const int64_t at = (image * shape.out_height + y) * shape.out_width + first;
#pragma unroll
  for (int r = 0; r < kPoolRun; ++r) {
    if (first + r >= shape.out_width) break;
    store_vec8<kAligned>(out.at<T>(at + r) + channel, best[r].result(), n);
  }
}

}  // namespace

void max_pool(const Tensor& x, const RowView& in, const Tensor& out, const PoolWindow& window) {
  const DType dtype = dtype_of("max_pool2d", "x", x);
  const auto size = [](int64_t value) { return static_cast<int>(value); };
  constexpr int64_t kMost = std::numeric_limits<int>::max() - kVec;  // rounded up to whole threads it is an int
  FUSED_CNN_CHECK(x.size(1) <= kMost && out.size(2) <= kMost && out.size(3) <= kMost &&
                      row_count(x) <= std::numeric_limits<int>::max(),
                  "max_pool2d: x has more channels or pixels than 2^31, or so does the result: ", shape_of(x));
  const PoolShape shape{size(x.size(1)), size(x.size(2)), size(x.size(3)), size(out.size(2)), size(out.size(3))};
  const RowView to = rows_of(out);
  const int64_t threads =
      x.size(0) * out.size(2) * ceil_div<int64_t>(out.size(3), kPoolRun) * ceil_div<int64_t>(x.size(1), kVec);
  const Launch launch(x);
  const bool aligned = x.size(1) % kVec == 0 && aligned16(in, x.element_size()) && aligned16(to, x.element_size());
  const auto window_is = [&](int kernel, int stride) {
    return window.kernel == std::array{kernel, kernel} && window.stride == std::array{stride, stride} &&
           window.dilation == std::array{1, 1};
  };
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto kernel) {
      launch.run("max_pool_kernel", kernel, ceil_div<int64_t>(threads, kPoolThreads), 1, kPoolThreads, Rows(in),
                 Rows(to), shape, window, threads);
    };
    if (!aligned) return run(max_pool_kernel<T, false, 0, 0>);
    if (window_is(3, 1)) return run(max_pool_kernel<T, true, 3, 1>);
    if (window_is(3, 2)) return run(max_pool_kernel<T, true, 3, 2>);
    run(max_pool_kernel<T, true, 0, 0>);
  });
}

}  // namespace fused_cnn
