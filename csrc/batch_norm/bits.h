// ReLU's mask as one bit an element: what bn_add_relu keeps for its backward in place of a whole activation. Bit c of a
// row of C channels is set where the output is not <= 0 (so also for NaN); a row has ceil(C / 8) bytes.
#pragma once
#include "cpu/simd.h"

namespace fused_cnn::FUSED_CNN_LEVEL {
namespace {

template <typename C, typename Used>
FUSED_CNN_INLINE void store_bits(Vec<C> v, uint8_t* row, int64_t c, Used used) {
#if defined(__AVX512F__)
  uint32_t bits;
  if constexpr (sizeof(C) == 4) bits = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ);
  if constexpr (sizeof(C) == 8) bits = _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_NLE_UQ);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<C>; ++i) bits |= static_cast<uint32_t>(!(v[i] <= C(0))) << i;
#endif
  uint8_t* byte = row + c / 8;
  if (c % 8 == 0) {
    byte[0] = static_cast<uint8_t>(bits);
  } else {  // vectors of fewer than 8 lanes
    byte[0] |= static_cast<uint8_t>(bits << (c % 8));
  }
  if (min(used.n, kLanes<C>) > 8) byte[1] = static_cast<uint8_t>(bits >> 8);
}

// v where the bit is set, else 0.
template <typename C, typename Used>
FUSED_CNN_INLINE Vec<C> apply_bits(Vec<C> v, const uint8_t* row, int64_t c, Used used) {
  const uint8_t* byte = row + c / 8;
  const uint32_t bits = (byte[0] | (min(used.n, kLanes<C>) > 8 ? uint32_t{byte[1]} << 8 : 0u)) >> (c % 8);
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v);
  if constexpr (sizeof(C) == 8) return _mm512_maskz_mov_pd(static_cast<__mmask8>(bits), v);
#else
  using Int = decltype(v <= v);
  Int lane_bit;
  for (int i = 0; i < kLanes<C>; ++i) lane_bit[i] = 1 << i;
  return ((Int{} + static_cast<int>(bits)) & lane_bit) != 0 ? v : Vec<C>{};
#endif
}

}  // namespace
}  // namespace fused_cnn::FUSED_CNN_LEVEL
