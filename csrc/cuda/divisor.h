// Division: rounded up, and by a number that a launch knows and the compiler does not.
#pragma once
#include <cstdint>
#include "shared/dtype.h"

namespace fused_cnn {

template <typename T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// n / divisor(d), for 0 <= n and 0 < d, is their quotient by one multiplication: n d' >> shift, where d' = 2^shift / d,
// rounded up, makes it too large by less than n / 2^31.
struct Divisor {
  uint32_t inverse;
  int shift;
};
inline Divisor divisor(int d) {
  int shift = 31;
  while (int64_t{1} << (shift - 31) < d) ++shift;
  return {static_cast<uint32_t>(((uint64_t{1} << shift) + d - 1) / d), shift};
}
FUSED_CNN_HD int operator/(int n, const Divisor& by) {
  return static_cast<int>(static_cast<uint64_t>(n) * by.inverse >> by.shift);
}

}  // namespace fused_cnn
