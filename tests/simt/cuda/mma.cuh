// csrc/cuda/mma.cuh for this processor: lanes show each other their registers.
#pragma once
#include <cuda_runtime.h>
#include <cstdint>
#include "shared/dtype.h"

namespace fused_cnn {

#define FUSED_CNN_DYNAMIC_SHARED(name, most_bytes)                                        \
  static_assert((most_bytes) <= simt::kMostShared);                                       \
  alignas(16) static unsigned char name##_of_all[simt::kMostCluster * simt::kMostShared]; \
  unsigned char* const name = simt::shared_of_block(name##_of_all)

template <typename T>
inline float half_of(uint32_t pair, int i) {
  T value;
  memcpy(&value, reinterpret_cast<const char*>(&pair) + i * sizeof(T), sizeof(T));
  return to_compute(value);
}

template <typename T, int kEights>
inline void multiply_add(float (&sums)[4], const uint32_t (&a)[kEights][2], const uint32_t (&b)[kEights]) {
  struct Lane {
    uint32_t a[kEights][2], b[kEights];
  } mine;
  memcpy(mine.a, a, sizeof(a));
  memcpy(mine.b, b, sizeof(b));
  Lane lanes[32];
  simt::exchange(&mine, sizeof(mine), lanes);
  const int row = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * q + i % 2;
    for (int k = 0; k < 8 * kEights; ++k) {
      const int lane = k % 8 / 2;
      sums[i] += half_of<T>(lanes[4 * row + lane].a[k / 8][i / 2], k % 2) *
                 half_of<T>(lanes[4 * column + lane].b[k / 8], k % 2);
    }
  }
}

template <typename T>
inline uint32_t pair_of(float first, float second) {
  T values[2];
  from_compute(first, &values[0]);
  from_compute(second, &values[1]);
  uint32_t bits;
  memcpy(&bits, values, sizeof(bits));
  return bits;
}

template <typename T>
inline uint32_t max_of_pairs(uint32_t a, uint32_t b) {
  const auto larger = [](float x, float y) { return x != x || x > y ? x : y; };
  return pair_of<T>(larger(half_of<T>(a, 0), half_of<T>(b, 0)), larger(half_of<T>(a, 1), half_of<T>(b, 1)));
}

inline void copy_16_async(void* to, const void* from, bool inside) {
  struct Copy {
    void* to;
    const void* from;
    bool inside;
  } copy{to, from, inside};
  simt::later(
      simt::kCopies,
      [](const void* what) {
        const Copy& c = *static_cast<const Copy*>(what);
        uint4 value{};
        if (c.inside) value = *static_cast<const uint4*>(c.from);
        *static_cast<uint4*>(c.to) = value;
      },
      &copy, sizeof(copy));
}
inline void commit_copies() {
  simt::end_group(simt::kCopies);
}
inline void await_copies(int left) {
  simt::finish(simt::kCopies, left);
}
inline void await_copies() {
  commit_copies();
  await_copies(0);
}

}  // namespace fused_cnn
