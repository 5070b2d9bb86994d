// The largest of 8 channels' values so far, NaN the largest of all.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif
#include <limits>
#include "cuda/vector.cuh"

namespace fused_cnn {

template <typename T>
struct Maxima {
  compute_t<T> best[kVec];

  __device__ Maxima() {
#pragma unroll
    for (int j = 0; j < kVec; ++j) best[j] = -std::numeric_limits<compute_t<T>>::infinity();
  }
  __device__ void take(const Vec8<T>& value) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const compute_t<T> v = to_compute(value.v[j]);
      best[j] = v > best[j] || v != v ? v : best[j];
    }
  }
  __device__ Vec8<T> result() const {
    Vec8<T> vec;
#pragma unroll
    for (int j = 0; j < kVec; ++j) from_compute(best[j], &vec.v[j]);
    return vec;
  }
};

#ifdef __CUDACC__
// Two channels by one instruction.
template <typename T, typename Pair>
struct PairedMaxima {
  Pair best[kVec / 2];

  __device__ explicit PairedMaxima(Pair lowest) {
#pragma unroll
    for (int j = 0; j < kVec / 2; ++j) best[j] = lowest;
  }
  __device__ void take(const Vec8<T>& value) {
    Pair pairs[kVec / 2];
    memcpy(pairs, &value, sizeof(value));
#pragma unroll
    for (int j = 0; j < kVec / 2; ++j) best[j] = __hmax2_nan(best[j], pairs[j]);
  }
  __device__ Vec8<T> result() const {
    Vec8<T> vec;
    memcpy(&vec, best, sizeof(vec));
    return vec;
  }
};

template <>
struct Maxima<bf16_t> : PairedMaxima<bf16_t, __nv_bfloat162> {
  __device__ Maxima() : PairedMaxima(__float2bfloat162_rn(-std::numeric_limits<float>::infinity())) {}
};
template <>
struct Maxima<f16_t> : PairedMaxima<f16_t, __half2> {
  __device__ Maxima() : PairedMaxima(__float2half2_rn(-std::numeric_limits<float>::infinity())) {}
};
#endif

}  // namespace fused_cnn
