// The kernels for x86-64 with AVX2: 6 x 2 sums, 2 weights and 1 input in its 16 registers.
#if defined(__x86_64__)
#include <immintrin.h>
#include <cstdint>
#include <cstring>
#include "conv_plan.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

constexpr int kLanes = 8;
constexpr int kTilePixels = 6;
#define ENGINE_LEVEL avx2
#include "conv_level.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
