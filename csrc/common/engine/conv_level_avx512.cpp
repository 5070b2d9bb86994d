// The kernels for x86-64 with AVX-512: 14 x 2 sums, 2 weights and 1 input in its 32 registers.
#if defined(__x86_64__)
#include <immintrin.h>
#include <cstdint>
#include <cstring>
#include "conv_plan.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif

constexpr int kLanes = 16;
constexpr int kTilePixels = 14;
#define ENGINE_LEVEL avx512
#include "conv_level.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
