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

// sums += a b for a of 16 x 16 and b of 16 x 8. Lane l has rows l / 4 and l / 4 + 8 of a and of the sums, column l / 4
// of b, in each the pair 2 (l % 4) of every 8 columns of a, rows of b, or columns of the sums: a {row, row + 8, row and
// row + 8 in the second 8 columns}, b {first 8 rows, second 8}, sums {the pair of row, that of row + 8}.
template <typename T>
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16_t>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
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
// await_copies(), for the block behind the barrier that follows.
__device__ inline void copy_16_async(void* to, const void* from, bool inside) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
__device__ inline void await_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace fused_cnn
