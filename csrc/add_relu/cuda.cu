// fused_cnn::add_relu_fwd and add_relu_bwd on CUDA: one pass, 16-byte loads and stores, four of them in flight per
// thread. Reads two tensors and writes one; tensors that do not start on 16 bytes take the same loop with one element a
// step.
#include "add_relu/math.h"
#include "cuda/launch.cuh"

namespace fused_cnn {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

struct Forward {
  template <typename C>
  __device__ C operator()(C x, C residual) const {
    return add_relu::forward(x, residual);
  }
};
struct Backward {
  template <typename C>
  __device__ C operator()(C grad_out, C out) const {
    return add_relu::backward(grad_out, out);
  }
};

template <typename T, typename Op>
__device__ T apply(T a, T b, Op op) {
  T out;
  from_compute(op(to_compute(a), to_compute(b)), &out);
  return out;
}

template <typename T, typename Op>
__global__ void __launch_bounds__(kThreads)
    add_relu_vector_kernel(const Vec<T>* __restrict__ a, const Vec<T>* __restrict__ b, Vec<T>* __restrict__ out,
                           int64_t vectors, Op op) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kUnroll + threadIdx.x;
  Vec<T> va[kUnroll], vb[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kThreads;
    if (i < vectors) {
      va[u] = a[i];
      vb[u] = b[i];
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kThreads;
    if (i < vectors) {
#pragma unroll
      for (int j = 0; j < Vec<T>::size; ++j) va[u].v[j] = apply(va[u].v[j], vb[u].v[j], op);
      out[i] = va[u];
    }
  }
}

// Elements [begin, n), one a thread: the tail of the vector kernel, or all of a misaligned tensor.
template <typename T, typename Op>
__global__ void __launch_bounds__(kThreads)
    add_relu_scalar_kernel(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out, int64_t begin,
                           int64_t n, Op op) {
  const int64_t i = begin + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) out[i] = apply(a[i], b[i], op);
}

template <typename T, typename Op>
void run(const Launch& launch, const Tensor& a, const Tensor& b, Tensor& out, Op op) {
  const T* pa = static_cast<const T*>(a.data_ptr());
  const T* pb = static_cast<const T*>(b.data_ptr());
  T* po = static_cast<T*>(out.data_ptr());
  const int64_t n = a.numel();
  int64_t done = 0;
  if (aligned16(pa) && aligned16(pb) && aligned16(po)) {
    const int64_t vectors = n / Vec<T>::size;
    done = vectors * Vec<T>::size;
    if (vectors > 0) {
      launch.run("add_relu_vector_kernel", add_relu_vector_kernel<T, Op>,
                 ceil_div<int64_t>(vectors, kThreads * kUnroll), 1, kThreads, reinterpret_cast<const Vec<T>*>(pa),
                 reinterpret_cast<const Vec<T>*>(pb), reinterpret_cast<Vec<T>*>(po), vectors, op);
    }
  }
  if (done < n) {
    launch.run("add_relu_scalar_kernel", add_relu_scalar_kernel<T, Op>, ceil_div<int64_t>(n - done, kThreads), 1,
               kThreads, pa, pb, po, done, n, op);
  }
}

template <typename Op>
Tensor elementwise(DType dtype, const Tensor& a, const Tensor& b, Op op) {
  const MemoryFormat format = result_format(a);
  const Launch launch(a);
  const Tensor dense_a = dense(a, format), dense_b = dense(b, format);
  Tensor out = empty_like_4d(a, format);
  if (a.numel() == 0) return out;
  with_type(dtype, [&](auto element) { run<decltype(element)>(launch, dense_a, dense_b, out, op); });
  return out;
}

Tensor add_relu_fwd(const Tensor& x, const Tensor& residual) {
  check_4d("add_relu_fwd", "x", x);
  check_like("add_relu_fwd", "x", x, "residual", residual);
  return elementwise(dtype_of("add_relu_fwd", "x", x), x, residual, Forward{});
}

Tensor add_relu_bwd(const Tensor& grad_out, const Tensor& out) {
  check_4d("add_relu_bwd", "grad_out", grad_out);
  check_like("add_relu_bwd", "grad_out", grad_out, "out", out);
  return elementwise(dtype_of("add_relu_bwd", "grad_out", grad_out), dense(grad_out, result_format(out)), out,
                     Backward{});
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("add_relu_fwd", FUSED_CNN_BOX(&fused_cnn::add_relu_fwd));
  m.impl("add_relu_bwd", FUSED_CNN_BOX(&fused_cnn::add_relu_bwd));
}
