// Eight adjacent channels, the unit in which CUDA kernels move activations: 16 bytes of a 16-bit type.
#pragma once
#include <cuda_runtime.h>
#include "shared/dtype.h"

namespace fused_cnn {

constexpr int kOctet = 8;

template <typename T>
struct alignas(16) Octet {
  T v[kOctet];
};

// The first n channels at `at`, the others zero. With kVectors all 8 are there, on 16 bytes, and move 16 bytes at a
// time.
template <bool kVectors, typename T>
__device__ Octet<T> load_octet(const T* at, int n) {
  Octet<T> octet;
  if constexpr (kVectors) {
    octet = *reinterpret_cast<const Octet<T>*>(at);
  } else {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) octet.v[j] = j < n ? at[j] : T{};
  }
  return octet;
}

template <bool kVectors, typename T>
__device__ void store_octet(T* at, const Octet<T>& octet, int n) {
  if constexpr (kVectors) {
    // By intrinsic: the compiler stores elements that were computed one by one each by itself.
    uint4 words[sizeof(octet) / 16];
    memcpy(words, &octet, sizeof(octet));
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(octet) / 16); ++i) __stwb(reinterpret_cast<uint4*>(at) + i, words[i]);
  } else {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (j < n) at[j] = octet.v[j];
    }
  }
}

}  // namespace fused_cnn
