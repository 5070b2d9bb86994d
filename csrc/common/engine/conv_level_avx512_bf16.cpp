// The kernels for x86-64 with AVX-512 and its bfloat16 dot products, twice as many multiply-adds for bf16.
#if defined(__x86_64__)
#include <immintrin.h>
#include <cstdint>
#include <cstring>
#include "conv_plan.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif

constexpr int kLanes = 16;
constexpr int kTilePixels = 14;
#define ENGINE_LEVEL avx512_bf16
#define ENGINE_BF16_PRODUCTS
#include "conv_level.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
