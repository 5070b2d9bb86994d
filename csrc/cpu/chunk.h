// How element-wise CPU kernels read and write any dtype: a row is worked through in chunks that fit the first-level
// cache; a 16-bit chunk is converted to float in one vectorised loop, computed on, and converted back. float and double
// are used in place.
#pragma once
#include "shared/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fused_cnn::FUSED_CNN_LEVEL {
namespace {

constexpr int64_t kChunk = 512;

template <typename T>
inline void load_chunk(const T* in, compute_t<T>* out, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (__is_same(T, f16_t)) {
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
    }
  }
#endif
  for (; i < n; ++i) out[i] = to_compute(in[i]);
}

template <typename T>
inline void store_chunk(const compute_t<T>* in, T* out, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (__is_same(T, f16_t)) {
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
    }
  }
#endif
  for (; i < n; ++i) from_compute(in[i], out + i);
}

// One chunk of an input, in the compute type; for float and double it is the input itself.
template <typename T>
struct ChunkIn {
  compute_t<T> buffer[kChunk];
  const compute_t<T>* load(const T* in, int64_t n) {
    load_chunk(in, buffer, n);
    return buffer;
  }
};
template <>
struct ChunkIn<float> {
  const float* load(const float* in, int64_t) { return in; }
};
template <>
struct ChunkIn<double> {
  const double* load(const double* in, int64_t) { return in; }
};

// Where a chunk of an output is computed; store() puts it in place.
template <typename T>
struct ChunkOut {
  compute_t<T> buffer[kChunk];
  compute_t<T>* at(T*) { return buffer; }
  void store(T* out, int64_t n) { store_chunk(buffer, out, n); }
};
template <>
struct ChunkOut<float> {
  float* at(float* out) { return out; }
  void store(float*, int64_t) {}
};
template <>
struct ChunkOut<double> {
  double* at(double* out) { return out; }
  void store(double*, int64_t) {}
};

}  // namespace
}  // namespace fused_cnn::FUSED_CNN_LEVEL

// Calls f.template operator()<T>() with the C++ type of a DType.
#define FUSED_CNN_DISPATCH(dtype, T, ...) \
  switch (dtype) {                        \
    case DType::f64: {                    \
      using T = double;                   \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
    case DType::f32: {                    \
      using T = float;                    \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
    case DType::f16: {                    \
      using T = f16_t;                    \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
    case DType::bf16: {                   \
      using T = bf16_t;                   \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
  }
