// A warp's own tensor-core product and what goes with it, from sm_80 on: pairs of 16-bit values in 32 bits, and copies
// into shared memory that run on beside the products.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#include <type_traits>
#include "shared/dtype.h"

namespace fused_cnn {

// A block's shared memory, as large as its launch says.
#define FUSED_CNN_DYNAMIC_SHARED(name, most_bytes) extern __shared__ __align__(16) unsigned char name[]

// sums += a b for a of 16 x 8 kEights and b of 8 kEights x 8, of which there are one or two. Lane l has rows l / 4 and
// l / 4 + 8 of a and of the sums, column l / 4 of b, in each the pair 2 (l % 4) of every 8 columns of a, rows of b, or
// columns of the sums: a[eight] {row, row + 8}, b[eight], sums {the pair of row, that of row + 8}.
template <typename T, int kEights>
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&a)[kEights][2], const uint32_t (&b)[kEights]) {
  static_assert(kEights == 1 || kEights == 2);
  constexpr bool kBf16 = std::is_same_v<T, bf16_t>;
#define FUSED_CNN_MMA(shape, type, of_a, of_b, ...)                                                                    \
  asm("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, " of_a ", " of_b ", {%0,%1,%2,%3};" \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                                     \
      : __VA_ARGS__)
  if constexpr (kEights == 1 && kBf16) {
    FUSED_CNN_MMA("m16n8k8", "bf16", "{%4,%5}", "{%6}", "r"(a[0][0]), "r"(a[0][1]), "r"(b[0]));
  } else if constexpr (kEights == 1) {
    FUSED_CNN_MMA("m16n8k8", "f16", "{%4,%5}", "{%6}", "r"(a[0][0]), "r"(a[0][1]), "r"(b[0]));
  } else if constexpr (kBf16) {
    FUSED_CNN_MMA("m16n8k16", "bf16", "{%4,%5,%6,%7}", "{%8,%9}", "r"(a[0][0]), "r"(a[0][1]), "r"(a[1][0]),
                  "r"(a[1][1]), "r"(b[0]), "r"(b[1]));
  } else {
    FUSED_CNN_MMA("m16n8k16", "f16", "{%4,%5,%6,%7}", "{%8,%9}", "r"(a[0][0]), "r"(a[0][1]), "r"(a[1][0]), "r"(a[1][1]),
                  "r"(b[0]), "r"(b[1]));
  }
#undef FUSED_CNN_MMA
}

// The two as T, the first in the lower half.
template <typename T>
__device__ inline uint32_t pair_of(float first, float second) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, bf16_t>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
}

// The lower half or the upper.
template <typename T>
__device__ inline float half_of(uint32_t pair, int i) {
  T values[2];
  memcpy(values, &pair, sizeof(pair));
  return to_compute(values[i]);
}

// Each half's larger one; NaN is larger than all.
template <typename T>
__device__ inline uint32_t max_of_pairs(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<T, bf16_t>, __nv_bfloat162, __half2>;
  Pair x, y;
  memcpy(&x, &a, sizeof(x));
  memcpy(&y, &b, sizeof(y));
  const Pair larger = __hmax2_nan(x, y);
  uint32_t bits;
  memcpy(&bits, &larger, sizeof(bits));
  return bits;
}

// 16 bytes into shared memory, or zeros where `inside` does not hold; they are there for this thread behind
// await_copies(), or behind await_copies(left) where no more than `left`, at most 2, commit_copies() came after theirs;
// for the block behind the barrier that follows.
__device__ inline void copy_16_async(void* to, const void* from, bool inside) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
__device__ inline void await_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ inline void await_copies(int left) {
  if (left == 0) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  } else if (left == 1) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  }
}

}  // namespace fused_cnn
