// The element types that kernels read and write, and their conversions to the type that they compute in (float, or
// double for double); a GPU has instructions for them. No torch header: this file is compiled once per instruction set
// (cpu/level.h) and by nvcc.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FUSED_CNN_HD __host__ __device__ __forceinline__
#else
#define FUSED_CNN_HD inline __attribute__((always_inline))
#endif

namespace fused_cnn {

enum class DType { f64, f32, f16, bf16 };

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

template <typename T>
struct compute_type {
  using type = float;
};
template <>
struct compute_type<double> {
  using type = double;
};
template <typename T>
using compute_t = typename compute_type<T>::type;

// body(T{}) for the element type.
template <typename Body>
inline __attribute__((always_inline)) auto with_type(DType dtype, const Body& body) {
  if (dtype == DType::f64) return body(double{});
  if (dtype == DType::f32) return body(float{});
  if (dtype == DType::f16) return body(f16_t{});
  return body(bf16_t{});
}

namespace detail {
template <typename To, typename From>
FUSED_CNN_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// IEEE half precision in and out of 32 bits, for a scalar or a compiler vector of them (U uint32_t, F float).
// Branch-free, so that compilers vectorise it: the exponent is rebased by one multiplication, which makes subnormals
// right too.
template <typename F, typename U>
FUSED_CNN_HD F from_half(U half) {
  const U sign = (half & 0x8000u) << 16;
  const U magnitude = (half & 0x7fffu) << 13;
  const F scaled = bit_cast<F>(magnitude) * 0x1p112f;
  return bit_cast<F>(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bit_cast<U>(scaled)));
}
template <typename U, typename F>
FUSED_CNN_HD U to_half(F v) {
  const U u = bit_cast<U>(v);
  const U sign = (u >> 16) & 0x8000u;
  const U magnitude = u & 0x7fffffffu;
  // Subnormal results: adding 0.5 (whose last bit is worth 2^-24, as a half's is) rounds to nearest even in hardware.
  const U small = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
  const U normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const U finite = magnitude < 0x38800000u ? small : normal;
  const U large = magnitude > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;
  return sign | (magnitude >= 0x477ff000u ? large : finite);
}
}  // namespace detail

FUSED_CNN_HD double to_compute(double v) {
  return v;
}
FUSED_CNN_HD float to_compute(float v) {
  return v;
}
FUSED_CNN_HD float to_compute(bf16_t v) {
  return detail::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16);
}
FUSED_CNN_HD float to_compute(f16_t v) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
#else
  return detail::from_half<float>(uint32_t{v.bits});
#endif
}

FUSED_CNN_HD void from_compute(double v, double* out) {
  *out = v;
}
FUSED_CNN_HD void from_compute(float v, float* out) {
  *out = v;
}
// Round to nearest even; a NaN stays a (quiet) NaN.
FUSED_CNN_HD void from_compute(float v, bf16_t* out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(v));
#else
  const uint32_t u = detail::bit_cast<uint32_t>(v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}
FUSED_CNN_HD void from_compute(float v, f16_t* out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(v));
#else
  out->bits = static_cast<uint16_t>(detail::to_half<uint32_t>(v));
#endif
}

}  // namespace fused_cnn
