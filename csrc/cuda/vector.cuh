// Vectorised access of 8 adjacent channels, the unit in which CUDA kernels move activations: one instruction of 16
// bytes for a 16-bit type.
#pragma once
#include <cuda_runtime.h>
#include "shared/branches.h"

namespace fused_cnn {

constexpr int kVec = 8;

template <typename T>
struct alignas(16) Vec8 {
  T v[kVec];
};

inline bool aligned16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Every row, of elements of so many bytes.
inline bool aligned16(const Rows& rows, int64_t element_size) {
  return aligned16(rows.data) && rows.pitch * element_size % 16 == 0;
}

// The first n channels at `at`, the others zero. With kAligned all 8 are there, on 16 bytes, and move 16 bytes at a
// time.
template <bool kAligned, typename T>
__device__ Vec8<T> load_vec8(const T* at, int n = kVec) {
  Vec8<T> vec;
  if constexpr (kAligned) {
    vec = *reinterpret_cast<const Vec8<T>*>(at);
  } else {
#pragma unroll
    for (int j = 0; j < kVec; ++j) vec.v[j] = j < n ? at[j] : T{};
  }
  return vec;
}

template <bool kAligned, typename T>
__device__ void store_vec8(T* at, const Vec8<T>& vec, int n = kVec) {
  if constexpr (kAligned) {
    // By intrinsic: the compiler stores elements that were computed one by one each by itself.
    uint4 words[sizeof(vec) / 16];
    memcpy(words, &vec, sizeof(vec));
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(vec) / 16); ++i) __stwb(reinterpret_cast<uint4*>(at) + i, words[i]);
  } else {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      if (j < n) at[j] = vec.v[j];
    }
  }
}

}  // namespace fused_cnn
