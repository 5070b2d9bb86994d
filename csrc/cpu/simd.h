// Vectors of compute-type lanes for CPU kernels: load<T> converts any dtype to float (double for double)
// lanes, store converts back. They are compiler vectors, so math.h's formulas take them as they take scalars.
// A row of channels is walked by columns(), whose last step carries the number of lanes left; row_groups()
// hands out the rows. No standard-library templates here (cpu_level.h).
#pragma once
#include "shared/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Bodies of loops are lambdas; each must be compiled into its loop.
#define FUSED_CNN_INLINE __attribute__((always_inline))

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

// How many lanes of a vector are in use: all of them, known when compiling, or the last `n` of a row.
struct All {};
struct Some {
  int n;
};
template <typename C>
constexpr int lanes_used(All) {
  return kLanes<C>;
}
template <typename C>
constexpr int lanes_used(Some some) {
  return some.n;
}

template <typename C>
inline Vec<C> splat(C v) {
  return Vec<C>{} + v;
}

inline Vec<float> to_lanes(HalfWords bits, bf16_t) {
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, Words) << 16);
}
inline Vec<float> to_lanes(HalfWords bits, f16_t) {
#if defined(__AVX512F__)
  // The masked form with all lanes on: GCC 12 warns of its own header's undefined operand in the plain one.
  return _mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(bits));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(bits));
#else
  Vec<float> out;
  for (int i = 0; i < kLanes<float>; ++i) out[i] = to_compute(f16_t{bits[i]});
  return out;
#endif
}

inline HalfWords to_bits(Vec<float> v, bf16_t) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<HalfWords>(_mm512_cvtneps_pbh(v));  // subnormals become zero
#else
  const Words u = reinterpret_cast<Words>(v);
  const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Words quiet_nan = Words{} + 0x7fc0u;
  return __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded, HalfWords);
#endif
}
inline HalfWords to_bits(Vec<float> v, f16_t) {
#if defined(__AVX512F__)
  return reinterpret_cast<HalfWords>(_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return reinterpret_cast<HalfWords>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  HalfWords out;
  for (int i = 0; i < kLanes<float>; ++i) {
    f16_t half;
    from_compute(v[i], &half);
    out[i] = half.bits;
  }
  return out;
#endif
}

template <typename T>
inline Vec<compute_t<T>> load(const T* p, All) {
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
inline void store(Vec<compute_t<T>> v, T* p, All) {
  if constexpr (sizeof(T) == 2) {
    const HalfWords bits = to_bits(v, T{});
    memcpy(p, &bits, sizeof(bits));
  } else {
    memcpy(p, &v, sizeof(v));
  }
}

// Lanes past the last are read as zero and not written.
template <typename T>
inline Vec<compute_t<T>> load(const T* p, Some some) {
#if defined(__AVX512BW__)
  const auto mask = (1u << some.n) - 1;
  if constexpr (sizeof(T) == 2) return to_lanes(reinterpret_cast<HalfWords>(_mm256_maskz_loadu_epi16(mask, p)), T{});
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(mask, p);
  if constexpr (sizeof(T) == 8) return _mm512_maskz_loadu_pd(mask, p);
#else
  T lanes[kLanes<compute_t<T>>] = {};
  for (int i = 0; i < some.n; ++i) lanes[i] = p[i];
  return load(static_cast<const T*>(lanes), All{});
#endif
}

template <typename T>
inline void store(Vec<compute_t<T>> v, T* p, Some some) {
#if defined(__AVX512BW__)
  const auto mask = (1u << some.n) - 1;
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, mask, reinterpret_cast<__m256i>(to_bits(v, T{})));
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, mask, v);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, mask, v);
#else
  T lanes[kLanes<compute_t<T>>];
  store(v, static_cast<T*>(lanes), All{});
  for (int i = 0; i < some.n; ++i) p[i] = lanes[i];
#endif
}

// body(first column, All or Some) over a row of `channels` columns.
template <typename C, typename F>
FUSED_CNN_INLINE inline void columns(int64_t channels, const F& body) {
  int64_t c = 0;
  for (; c + kLanes<C> <= channels; c += kLanes<C>) body(c, All{});
  if (c < channels) body(c, Some{static_cast<int>(channels - c)});
}

template <int N>
struct Rows {
  static constexpr int n = N;
};

// body(first row, Rows<4> or Rows<1>) over [0, rows). Four short rows are worked on together, so that what is
// per channel is loaded once for the four; long rows one after the other, because hardware prefetchers lose
// four interleaved streams (measured on Zen 4: the four together are 1.3x faster at 64 floats a row, 2x
// slower at 256).
template <typename F>
FUSED_CNN_INLINE inline void row_groups(int64_t rows, int64_t row_bytes, const F& body) {
  int64_t r = 0;
  if (row_bytes <= 256) {
    for (; r + 4 <= rows; r += 4) body(r, Rows<4>{});
  }
  for (; r < rows; ++r) body(r, Rows<1>{});
}

}  // namespace
}  // namespace fused_cnn::FUSED_CNN_LEVEL
