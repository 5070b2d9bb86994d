// Vectors for CPU kernels, as wide as the instruction set's registers. load() converts any dtype to float (double to
// double) lanes and store() converts back; only the lanes that are asked for are read or written. They are compiler
// vectors, so formulas for scalars (shared/relu.h, a room's math.h) work on them too. No standard-library
// templates here, and nothing but internal linkage (cpu/level.h).
#pragma once
#include "shared/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// For functions, and for lambdas that are loops' bodies: both must be compiled into their loops.
#define FUSED_CNN_INLINE inline __attribute__((always_inline))
#define FUSED_CNN_LAMBDA __attribute__((always_inline))
#if defined(__clang__)
#define FUSED_CNN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FUSED_CNN_UNROLL _Pragma("GCC unroll 32")
#endif

namespace fused_cnn::FUSED_CNN_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename C>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(C));

template <typename C>
struct VecOf {
  typedef C type __attribute__((vector_size(kVectorBytes)));
};
template <typename C>
using Vec = typename VecOf<C>::type;
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
using Words = Vec<uint32_t>;

// Which lanes of a vector are in use: all of them, or the first `n`, which are fewer.
struct All {
  static constexpr int64_t n = kVectorBytes;
};
struct Some {
  int64_t n;
};

// Conversions between 16 and 32 bits, which GCC 12 makes many instructions of. With AVX-512 in their masked form with
// all lanes on, as it warns of its own header's undefined operand in the plain one.
FUSED_CNN_INLINE Words widen(HalfWords bits) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)));
#elif defined(__x86_64__)
  const __m128i low = _mm_cvtsi64_si128(detail::bit_cast<int64_t>(bits));
  return reinterpret_cast<Words>(_mm_unpacklo_epi16(low, _mm_setzero_si128()));
#else
  return __builtin_convertvector(bits, Words);
#endif
}
FUSED_CNN_INLINE HalfWords narrow(Words v) {  // the upper halves are zero
#if defined(__AVX512F__)
  return reinterpret_cast<HalfWords>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i both = reinterpret_cast<__m256i>(v);
  return reinterpret_cast<HalfWords>(_mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
#elif defined(__x86_64__)
  const __m128i signed_halves = _mm_srai_epi32(_mm_slli_epi32(reinterpret_cast<__m128i>(v), 16), 16);
  return detail::bit_cast<HalfWords>(_mm_cvtsi128_si64(_mm_packs_epi32(signed_halves, signed_halves)));
#else
  return __builtin_convertvector(v, HalfWords);
#endif
}

FUSED_CNN_INLINE Vec<float> to_lanes(HalfWords bits, bf16_t) {
  return reinterpret_cast<Vec<float>>(widen(bits) << 16);
}
FUSED_CNN_INLINE Vec<float> to_lanes(HalfWords bits, f16_t) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(bits));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(bits));
#else
  return detail::from_half<Vec<float>>(widen(bits));
#endif
}

// Round to nearest even. A NaN keeps its upper bits and is made quiet, so that it cannot round up to infinity.
FUSED_CNN_INLINE HalfWords to_bits(Vec<float> v, bf16_t) {
#if defined(__AVX512BF16__)
  constexpr int kSubnormal = 0x20;  // of which the instruction would make zeros
  if (__builtin_expect(_mm512_fpclass_ps_mask(v, kSubnormal) == 0, 1))
    return reinterpret_cast<HalfWords>(_mm512_cvtneps_pbh(v));
#endif
  const Words u = reinterpret_cast<Words>(v);
  return narrow(v == v ? (u + 0x7fffu + ((u >> 16) & 1u)) >> 16 : (u >> 16) | 0x40u);
}
FUSED_CNN_INLINE HalfWords to_bits(Vec<float> v, f16_t) {
#if defined(__AVX512F__)
  return reinterpret_cast<HalfWords>(_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return reinterpret_cast<HalfWords>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  return narrow(detail::to_half<Words>(v));
#endif
}

template <typename T>
FUSED_CNN_INLINE Vec<compute_t<T>> load(const T* p, All = {}) {
  if constexpr (sizeof(T) == 2) {
    HalfWords bits;
    memcpy(&bits, p, sizeof(bits));
    return to_lanes(bits, T{});
  } else {
    Vec<T> v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
}

template <typename T>
FUSED_CNN_INLINE void store(T* p, Vec<compute_t<T>> v, All = {}) {
  if constexpr (sizeof(T) == 2) {
    const HalfWords bits = to_bits(v, T{});
    memcpy(p, &bits, sizeof(bits));
  } else {
    memcpy(p, &v, sizeof(v));
  }
}

// Two neighbouring vectors: one store of a whole cache line where they can be converted together.
template <typename T>
FUSED_CNN_INLINE void store_pair(T* p, Vec<compute_t<T>> first, Vec<compute_t<T>> second) {
#if defined(__AVX512BF16__)
  if constexpr (__is_same(T, bf16_t)) {
    const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
    memcpy(p, &both, sizeof(both));
    return;
  }
#endif
  store(p, first);
  store(p + kLanes<compute_t<T>>, second);
}

#if !defined(__AVX512BW__)
// memcpy of n < kLanes elements in pieces whose sizes the compiler knows: a call of memcpy costs more than the work.
template <typename T, int kPiece = kLanes<compute_t<T>> / 2>
FUSED_CNN_INLINE void copy_lanes(T* to, const T* from, int64_t n) {
  const int64_t piece = n & kPiece;
  if (piece) memcpy(to, from, kPiece * sizeof(T));
  if constexpr (kPiece > 1) copy_lanes<T, kPiece / 2>(to + piece, from + piece, n);
}
#endif

// Lanes that are not in use are read as zero and not written.
template <typename T>
FUSED_CNN_INLINE Vec<compute_t<T>> load(const T* p, Some some) {
#if defined(__AVX512BW__)
  const auto mask = (1u << some.n) - 1;
  if constexpr (sizeof(T) == 2) return to_lanes(reinterpret_cast<HalfWords>(_mm256_maskz_loadu_epi16(mask, p)), T{});
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(mask, p);
  if constexpr (sizeof(T) == 8) return _mm512_maskz_loadu_pd(mask, p);
#else
  T lanes[kLanes<compute_t<T>>] = {};
  copy_lanes(lanes, p, some.n);
  return load(static_cast<const T*>(lanes));
#endif
}

template <typename T>
FUSED_CNN_INLINE void store(T* p, Vec<compute_t<T>> v, Some some) {
#if defined(__AVX512BW__)
  const auto mask = (1u << some.n) - 1;
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, mask, reinterpret_cast<__m256i>(to_bits(v, T{})));
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, mask, v);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, mask, v);
#else
  T lanes[kLanes<compute_t<T>>];
  store(static_cast<T*>(lanes), v);
  copy_lanes(p, lanes, some.n);
#endif
}

// The first n lanes, or all where n is larger.
template <typename T>
FUSED_CNN_INLINE Vec<compute_t<T>> load(const T* p, int64_t n) {
  return n >= kLanes<compute_t<T>> ? load(p) : load(p, Some{n});
}
template <typename T>
FUSED_CNN_INLINE void store(T* p, Vec<compute_t<T>> v, int64_t n) {
  n >= kLanes<compute_t<T>> ? store(p, v) : store(p, v, Some{n});
}

// The standard library's are templates.
FUSED_CNN_INLINE int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
FUSED_CNN_INLINE int64_t max(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// body(first column, All or Some) over a row of `channels` columns.
template <typename C, typename F>
FUSED_CNN_INLINE void columns(int64_t channels, const F& body) {
  int64_t c = 0;
  for (; c + kLanes<C> <= channels; c += kLanes<C>) body(c, All{});
  if (c < channels) body(c, Some{channels - c});
}

template <int N>
struct Count {
  static constexpr int n = N;
};

// body(first row, Count<4> or Count<1>) over [begin, end). Four short rows are worked on together, so that what is
// per channel is loaded once for the four; long rows one after the other, because hardware prefetchers lose
// four interleaved streams (measured on Zen 4: the four together are 1.3x faster at 64 floats a row, 2x
// slower at 256).
template <typename F>
FUSED_CNN_INLINE void row_groups(int64_t begin, int64_t end, int64_t row_bytes, const F& body) {
  int64_t r = begin;
  if (row_bytes <= 256) {
    for (; r + 4 <= end; r += 4) body(r, Count<4>{});
  }
  for (; r < end; ++r) body(r, Count<1>{});
}

}  // namespace
}  // namespace fused_cnn::FUSED_CNN_LEVEL
