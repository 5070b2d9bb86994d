// csrc/cuda/wgmma.cuh for this processor: each thread computes its own sums from shared memory, when the product is
// called or, where simt_late says so, when it waits for it.
#pragma once
#include <cstring>
#include "cuda/mma.cuh"

namespace fused_cnn {

struct SharedOperand {
  const unsigned char* at;
  int next;
  SharedOperand operator+(int n) const { return {at + 16 * n, next}; }
};
inline SharedOperand shared_operand(const void* at, int next) {
  return {static_cast<const unsigned char*>(at), next};
}

// The 16 elements of a row. Shared memory is the library's own data: there is nothing to check.
template <typename T>
__attribute__((no_sanitize("kernel-address"))) inline void row_of(const SharedOperand& operand, int row,
                                                                  float (&values)[16]) {
  T elements[16];
  for (int half = 0; half < 2; ++half) {
    std::memcpy(elements + 8 * half, operand.at + row * 16 + half * operand.next, 16);
  }
  for (int i = 0; i < 16; ++i) values[i] = to_compute(elements[i]);
}

template <typename T, int kColumns>
inline void multiply_add(float (&sums)[kColumns / 8][4], SharedOperand a, SharedOperand b, bool add) {
  struct Product {
    float (*sums)[4];
    SharedOperand a, b;
    bool add;
    unsigned thread;
  } product{sums, a, b, add, threadIdx.x};
  simt::later(
      simt::kProducts,
      [](const void* what) {
        const Product& p = *static_cast<const Product*>(what);
        const int first = p.thread % 128 / 32 * 16 + p.thread % 32 / 4;
        float rows[2][16], columns[2][16];
        for (int half = 0; half < 2; ++half) row_of<T>(p.a, first + 8 * half, rows[half]);
        for (int j = 0; j < kColumns / 8; ++j) {
          for (int i = 0; i < 2; ++i) row_of<T>(p.b, 8 * j + p.thread % 4 * 2 + i, columns[i]);
          for (int i = 0; i < 4; ++i)
            p.sums[j][i] = simt::dot(rows[i / 2], columns[i % 2], p.add ? p.sums[j][i] : 0.0f);
        }
      },
      &product, sizeof(product));
}

inline void begin_products() {}
inline void end_products() {
  simt::end_group(simt::kProducts);
}
template <int kRunning>
inline void await_products() {
  simt::finish(simt::kProducts, kRunning);
}
template <int kEights>
inline void keep(float (&)[kEights][4]) {}

template <int kRunning>
inline void await_copies_for_products() {
  simt::finish(simt::kCopies, kRunning);
}

}  // namespace fused_cnn
