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

// What a thread takes: pixels of a row, from `first` on, and n channels; neighbours have neighbouring channels.
struct Run {
  int64_t image;
  int y, first, channel, n;
};

template <int kRun>
__device__ Run run_of(int64_t thread, int channels, int height, int width) {
  const int vecs = ceil_div(channels, kVec), runs = ceil_div(width, kRun);
  int64_t rest = thread / vecs;
  const int channel = static_cast<int>(thread - rest * vecs) * kVec, left_over = channels - channel;
  const int first = static_cast<int>(rest % runs) * kRun;
  rest /= runs;
  return {rest / height, static_cast<int>(rest % height), first, channel, left_over < kVec ? left_over : kVec};
}

// A window's sizes, known to the compiler where kKernel and kStride are not 0.
template <int kKernel, int kStride>
struct Steps {
  int kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;

  __device__ explicit Steps(const PoolWindow& window)
      : kernel_h(kKernel ? kKernel : window.kernel[0]),
        kernel_w(kKernel ? kKernel : window.kernel[1]),
        stride_h(kStride ? kStride : window.stride[0]),
        stride_w(kStride ? kStride : window.stride[1]),
        dilation_h(kKernel ? 1 : window.dilation[0]),
        dilation_w(kKernel ? 1 : window.dilation[1]) {}
};

// A thread takes a run of results of one row and 8 channels: neighbouring threads neighbouring channels, so that a warp
// moves whole lines. kKernel and kStride are the window's, both ways, without dilation; 0: any. x is read from memory
// once, its overlaps from the caches; the copy's bandwidth is the limit.
template <typename T, bool kAligned, int kKernel, int kStride>
__global__ void __launch_bounds__(kPoolThreads)
    max_pool_kernel(Rows x, Rows out, PoolShape shape, PoolWindow window, int64_t threads) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kPoolThreads + threadIdx.x;
  if (thread >= threads) return;
  const auto [image, y, first, channel, n] =
      run_of<kPoolRun>(thread, shape.channels, shape.out_height, shape.out_width);
  const auto [kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w] = Steps<kKernel, kStride>(window);
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

// The largest of 8 channels' values so far, and which tap of the window each is: the first of equal ones, the last NaN,
// as PyTorch's pool has it.
template <typename T>
struct Places {
  compute_t<T> best[kVec];
  int place[kVec];

  __device__ Places() {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      best[j] = -std::numeric_limits<compute_t<T>>::infinity();
      place[j] = -1;
    }
  }
  __device__ void take(const Vec8<T>& value, int tap) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const compute_t<T> v = to_compute(value.v[j]);
      const bool better = v > best[j] || v != v || place[j] < 0;
      best[j] = better ? v : best[j];
      place[j] = better ? tap : place[j];
    }
  }
};

struct alignas(8) Bytes8 {
  uint8_t v[kVec];
};

constexpr int kPlaceRun = 2;  // as kPoolRun, with more registers for each

// The same with places; where a window has no pixel of x, as a dilated one may in the padding, that is 255.
template <typename T, bool kAligned, int kKernel, int kStride>
__global__ void __launch_bounds__(kPoolThreads)
    max_pool_index_kernel(Rows x, Rows out, uint8_t* __restrict__ index, PoolShape shape, PoolWindow window,
                          int64_t threads) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kPoolThreads + threadIdx.x;
  if (thread >= threads) return;
  const auto [image, y, first, channel, n] =
      run_of<kPlaceRun>(thread, shape.channels, shape.out_height, shape.out_width);
  const auto [kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w] = Steps<kKernel, kStride>(window);
  const int64_t top = int64_t{y} * stride_h - window.padding[0], left = int64_t{first} * stride_w - window.padding[1];

  Places<T> best[kPlaceRun];
#pragma unroll
  for (int i = 0; i < kernel_h; ++i) {
    const int64_t in_y = top + int64_t{i} * dilation_h;
    if (in_y < 0 || in_y >= shape.height) continue;
    const int64_t row = (image * shape.height + in_y) * shape.width;
    const auto load = [&](int64_t in_x) { return load_vec8<kAligned>(x.at<const T>(row + in_x) + channel, n); };
    if constexpr (kKernel > 0) {
      constexpr int kSpan = (kPlaceRun - 1) * kStride + kKernel;
      Vec8<T> values[kSpan];
#pragma unroll
      for (int c = 0; c < kSpan; ++c) {
        if (left + c >= 0 && left + c < shape.width) values[c] = load(left + c);
      }
#pragma unroll
      for (int c = 0; c < kSpan; ++c) {
        if (left + c < 0 || left + c >= shape.width) continue;
#pragma unroll
        for (int r = 0; r < kPlaceRun; ++r) {
          const int tap = c - r * kStride;
          if (tap >= 0 && tap < kKernel) best[r].take(values[c], i * kKernel + tap);
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < kPlaceRun; ++r) {
        for (int c = 0; c < kernel_w; ++c) {
          const int64_t in_x = left + int64_t{r} * stride_w + int64_t{c} * dilation_w;
          if (in_x >= 0 && in_x < shape.width) best[r].take(load(in_x), i * kernel_w + c);
        }
      }
    }
  }
  const int64_t at = (image * shape.out_height + y) * shape.out_width + first;
#pragma unroll
  for (int r = 0; r < kPlaceRun; ++r) {
    if (first + r >= shape.out_width) break;
    Vec8<T> result;
    Bytes8 places;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      from_compute(best[r].best[j], &result.v[j]);
      places.v[j] = static_cast<uint8_t>(best[r].place[j]);
    }
    store_vec8<kAligned>(out.at<T>(at + r) + channel, result, n);
    uint8_t* const to = index + (at + r) * shape.channels + channel;
    if constexpr (kAligned) {
      *reinterpret_cast<Bytes8*>(to) = places;
    } else {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        if (j < n) to[j] = places.v[j];
      }
    }
  }
}

// Pixels beside each other in a thread, whose windows are loaded once.
constexpr int gradient_run(int kernel) {
  return kernel > 0 ? 4 : 1;
}

// grad_x of a run of pixels of one row and 8 channels. grad_out, its places and grad_x move once, their overlaps come
// from the caches; the copy's bandwidth is the limit. No atomics: sums are in the order of the taps.
template <typename T, bool kAligned, int kKernel, int kStride>
__global__ void __launch_bounds__(kPoolThreads)
    max_pool_gradient_kernel(Rows grad_out, const uint8_t* __restrict__ index, Rows grad_x, PoolShape shape,
                             PoolWindow window, int64_t threads) {
  using C = compute_t<T>;
  constexpr int kRun = gradient_run(kKernel);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kPoolThreads + threadIdx.x;
  if (thread >= threads) return;
  const auto [image, y, first, channel, n] = run_of<kRun>(thread, shape.channels, shape.height, shape.width);
  const auto [kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w] = Steps<kKernel, kStride>(window);

  C total[kRun][kVec] = {};
  // Adds a window's gradient to those of the run's pixels r whose tap(r) of it there is.
  const auto add = [&](int64_t at, const auto& tap) {
    const Vec8<T> grad = load_vec8<kAligned>(grad_out.at<const T>(at) + channel, n);
    const uint8_t* const from = index + at * shape.channels + channel;
    Bytes8 places{};
    if constexpr (kAligned) {
      places = *reinterpret_cast<const Bytes8*>(from);
    } else {
#pragma unroll
      for (int j = 0; j < kVec; ++j) places.v[j] = j < n ? from[j] : 0;
    }
#pragma unroll
    for (int r = 0; r < kRun; ++r) {
      const int wanted = tap(r);
#pragma unroll
      for (int j = 0; j < kVec; ++j) total[r][j] += places.v[j] == wanted ? to_compute(grad.v[j]) : C{};
    }
  };
#pragma unroll
  for (int i = 0; i < kernel_h; ++i) {
    const int64_t down = int64_t{y} + window.padding[0] - int64_t{i} * dilation_h;
    if (down < 0 || down % stride_h != 0 || down / stride_h >= shape.out_height) continue;
    const int64_t row = (image * shape.out_height + down / stride_h) * shape.out_width;
    const int left = first + window.padding[1];
    if constexpr (kKernel > 0) {
      constexpr int kMostWindows = (kRun + kKernel - 2) / kStride + 1;
      const int lowest = left < kKernel ? 0 : (left - kKernel) / kStride + 1;  // the first that reaches the run
#pragma unroll
      for (int u = 0; u < kMostWindows; ++u) {
        const int out_x = lowest + u, tap = left - out_x * kStride;
        if (out_x >= shape.out_width || tap + kRun <= 0) break;
        add(row + out_x, [&](int r) { return tap + r >= 0 && tap + r < kKernel ? i * kKernel + tap + r : -1; });
      }
    } else {
      for (int c = 0; c < kernel_w; ++c) {
        const int64_t across = int64_t{left} - int64_t{c} * dilation_w;
        if (across < 0 || across % stride_w != 0 || across / stride_w >= shape.out_width) continue;
        add(row + across / stride_w, [&](int) { return i * kernel_w + c; });
      }
    }
  }
  const int64_t at = (image * shape.height + y) * shape.width + first;
#pragma unroll
  for (int r = 0; r < kRun; ++r) {
    if (first + r >= shape.width) break;
    Vec8<T> result;
#pragma unroll
    for (int j = 0; j < kVec; ++j) from_compute(total[r][j], &result.v[j]);
    store_vec8<kAligned>(grad_x.at<T>(at + r) + channel, result, n);
  }
}

PoolShape pool_shape(const Tensor& x, const Tensor& out) {
  const auto size = [](int64_t value) { return static_cast<int>(value); };
  constexpr int64_t kMost = std::numeric_limits<int>::max() - kVec;  // rounded up to whole threads it is an int
  FUSED_CNN_CHECK(x.size(1) <= kMost && out.size(2) <= kMost && out.size(3) <= kMost &&
                      row_count(x) <= std::numeric_limits<int>::max(),
                  "max_pool2d: x has more channels or pixels than 2^31, or so does the result: ", shape_of(x));
  return {size(x.size(1)), size(x.size(2)), size(x.size(3)), size(out.size(2)), size(out.size(3))};
}

// run(T{}, constants of kAligned, kernel and stride) for the window, of those that have kernels of their own.
template <typename Run>
void with_window(DType dtype, const PoolWindow& window, bool aligned, const Run& run) {
  const auto is = [&](int kernel, int stride) {
    return aligned && window.kernel == std::array{kernel, kernel} && window.stride == std::array{stride, stride} &&
           window.dilation == std::array{1, 1};
  };
  with_type(dtype, [&](auto element) {
    constexpr std::integral_constant<int, 0> any;
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, 2> two;
    constexpr std::integral_constant<int, 3> three;
    if (!aligned) return run(element, std::false_type(), any, any);
    if (is(3, 1)) return run(element, std::true_type(), three, one);
    if (is(3, 2)) return run(element, std::true_type(), three, two);
    run(element, std::true_type(), any, any);
  });
}

}  // namespace

void max_pool(const Tensor& x, const RowView& in, const Tensor& out, const PoolWindow& window, uint8_t* index) {
  const PoolShape shape = pool_shape(x, out);
  const RowView to = rows_of(out);
  const Launch launch(x);
  const bool aligned = x.size(1) % kVec == 0 && aligned16(in, x.element_size()) && aligned16(to, x.element_size());
  const auto threads = [&](int run) {
    return x.size(0) * out.size(2) * ceil_div<int64_t>(out.size(3), run) * ceil_div<int64_t>(x.size(1), kVec);
  };
  with_window(dtype_of("max_pool2d", "x", x), window, aligned, [&](auto element, auto whole, auto kernel, auto stride) {
    using T = decltype(element);
    const int64_t count = threads(index ? kPlaceRun : kPoolRun), blocks = ceil_div<int64_t>(count, kPoolThreads);
    if (index) {
      launch.run("max_pool_index_kernel", max_pool_index_kernel<T, whole, kernel, stride>, blocks, 1, kPoolThreads,
                 Rows(in), Rows(to), index, shape, window, count);
    } else {
      launch.run("max_pool_kernel", max_pool_kernel<T, whole, kernel, stride>, blocks, 1, kPoolThreads, Rows(in),
                 Rows(to), shape, window, count);
    }
  });
}

void max_pool_gradient(const Tensor& grad_out, const uint8_t* index, const Tensor& grad_x, const PoolWindow& window) {
  const PoolShape shape = pool_shape(grad_x, grad_out);
  const RowView in = rows_of(grad_out), to = rows_of(grad_x);
  const Launch launch(grad_out);
  const int64_t size = grad_out.element_size();
  const bool aligned = grad_x.size(1) % kVec == 0 && aligned16(in, size) && aligned16(to, size);
  const auto run = [&](auto element, auto whole, auto kernel, auto stride) {
    const int64_t runs = ceil_div<int64_t>(grad_x.size(3), gradient_run(kernel));
    const int64_t count = grad_x.size(0) * grad_x.size(2) * runs * ceil_div<int64_t>(grad_x.size(1), kVec);
    launch.run("max_pool_gradient_kernel", max_pool_gradient_kernel<decltype(element), whole, kernel, stride>,
               ceil_div<int64_t>(count, kPoolThreads), 1, kPoolThreads, Rows(in), index, Rows(to), shape, window,
               count);
  };
  with_window(dtype_of("max_pool2d", "grad_out", grad_out), window, aligned, run);
}

}  // namespace fused_cnn
