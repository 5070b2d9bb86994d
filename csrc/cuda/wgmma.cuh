// A warpgroup's tensor-core product on sm_90a. It reads shared memory by itself and runs on beside the threads: they
// say when it begins and ends, and what copies it waits for, in groups.
#pragma once
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>
#include "cuda/mma.cuh"

namespace fused_cnn {

// A product's operand in shared memory, on 16 bytes: 8 elements of each row, one row behind the other, 16 bytes of
// each; these rows' next 8 elements `next` bytes from them. A sum with n is as far behind it as n rows.
struct SharedOperand {
  uint32_t at;

  __device__ SharedOperand operator+(int n) const { return {at + n}; }
  __device__ uint64_t descriptor() const {
    constexpr uint64_t kEightRows = 8;  // from 8 rows to the next 8, in units of 16 bytes
    return kEightRows << 32 | at;
  }
};
__device__ inline SharedOperand shared_operand(const void* at, int next) {
  constexpr uint32_t kOfBlock = (1 << 18) - 1;  // above that an address has the block's rank in its cluster
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(at)) & kOfBlock;
  return {address >> 4 | static_cast<uint32_t>(next >> 4) << 16};
}

// Whose sums follow the sum of T's products of 16 elements: 64 rows of a, kColumns rows of b.
template <typename T, int kColumns>
struct WarpgroupProduct;
#define FUSED_CNN_WGMMA(columns)                                                                                       \
  template <>                                                                                                          \
  struct WarpgroupProduct<bf16_t, columns>                                                                             \
      : cute::SM90::GMMA::MMA_64x##columns##x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K,                             \
                                                               cute::SM90::GMMA::Major::K> {};                         \
  template <>                                                                                                          \
  struct WarpgroupProduct<f16_t, columns>                                                                              \
      : cute::SM90::GMMA::MMA_64x##columns##x16_F32F16F16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K> { \
  };
FUSED_CNN_WGMMA(64)
#undef FUSED_CNN_WGMMA

// sums = a b + (add ? sums : 0), which are there behind await_products(). Lane l of warp w has rows 16 w + l / 4 and 8
// further of them, of every 8 columns the pair 2 (l % 4): sums[eight] {the pair of row, that of row + 8}.
template <typename T, int kColumns>
__device__ inline void multiply_add(float (&sums)[kColumns / 8][4], SharedOperand a, SharedOperand b, bool add) {
  using cute::SM90::GMMA::ScaleOut;
  [&]<size_t... kAt>(std::index_sequence<kAt...>) {
    WarpgroupProduct<T, kColumns>::fma(a.descriptor(), b.descriptor(), sums[kAt / 4][kAt % 4]...,
                                       add ? ScaleOut::One : ScaleOut::Zero);
  }(std::make_index_sequence<kColumns / 2>());
}

// Before a group of products: what they read was made visible to them, and nobody touches their sums any more.
__device__ inline void begin_products() {
  cute::warpgroup_arrive();
}
__device__ inline void end_products() {
  cute::warpgroup_commit_batch();
}
// All groups but the last kRunning are done.
template <int kRunning>
__device__ inline void await_products() {
  cute::warpgroup_wait<kRunning>();
}
// The compiler must not look for sums elsewhere than where products leave them.
template <int kEights>
__device__ inline void keep(float (&sums)[kEights][4]) {
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) cute::warpgroup_fence_operand(sums[j][i]);
  }
}

// All groups but the last kRunning are done, and what they brought is visible to products behind the next barrier.
template <int kRunning>
__device__ inline void await_copies_for_products() {
  asm volatile("cp.async.wait_group %0;\n\tfence.proxy.async.shared::cta;" ::"n"(kRunning) : "memory");
}

}  // namespace fused_cnn
