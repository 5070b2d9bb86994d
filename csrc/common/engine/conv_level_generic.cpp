// The kernels for any CPU: 128-bit vectors, which every 64-bit target has, and the only level off x86-64.
#include <cstdint>
#include <cstring>
#include "conv_plan.h"

constexpr int kLanes = 4;
#if defined(__x86_64__)
constexpr int kTilePixels = 6;  // 16 vector registers: 6 x 2 sums, 2 weights, 1 input
#else
constexpr int kTilePixels = 12;  // 32 of them on aarch64
#endif
#define ENGINE_LEVEL generic
#include "conv_level.inc"
