// The epilogue of sm_80's products: bias, residual, ReLU and the store, from the accumulators of a warp. Tensor cores
// leave a row's eight columns in four threads, a pair each. The four exchange pairs of four such groups of columns, so
// that each holds one group whole, and reads and writes 16 bytes of a 16-bit type.
#pragma once
#include "cuda/gemm/gemm.h"
#include "cuda/vector.cuh"
#include "shared/relu.h"

namespace fused_cnn {

// pairs[o] holds columns 2q and 2q + 1 of group o, where q is the thread's place in its quad; then columns 2r and
// 2r + 1 of group q in pairs[r].
template <typename V>
__device__ inline void exchange_in_quad(V (&pairs)[4][2]) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      if (o & step) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const V kept = upper ? pairs[o + step][i] : pairs[o][i];
        const V got = __shfl_xor_sync(0xffffffffu, upper ? pairs[o][i] : pairs[o + step][i], step);
        pairs[o][i] = upper ? got : kept;
        pairs[o + step][i] = upper ? kept : got;
      }
    }
  }
}

// Finishes four groups of 8 columns of row `row` of an m x n result, of which group o begins at columns[o]. Every
// thread of a warp calls this.
template <typename T>
__device__ void epilogue_store(const GemmEpilogue& epilogue, float (&pairs)[4][2], int64_t row, const int (&columns)[4],
                               int64_t m, int n) {
  exchange_in_quad(pairs);
  const int q = threadIdx.x % 4;
  int column = q == 0 ? columns[0] : q == 1 ? columns[1] : q == 2 ? columns[2] : columns[3];
  if (row >= m || column >= n) return;
  Vec8<T> out, bias{}, residual{};
  if (epilogue.bias) bias = load_vec8<true>(static_cast<const T*>(epilogue.bias) + column);
  if (epilogue.residual.data) residual = load_vec8<true>(epilogue.residual.at<const T>(row) + column);
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const float v = pairs[j / 2][j % 2] + to_compute(bias.v[j]) + to_compute(residual.v[j]);
    from_compute(epilogue.relu ? relu(v) : v, &out.v[j]);
  }
  GemmSlice slice = epilogue.slice[0];
#pragma unroll
  for (int s = 1; s < kGemmSlices; ++s) {
    if (s < epilogue.slices && column >= slice.columns) {
      column -= slice.columns;
      slice = epilogue.slice[s];
    }
  }
  store_vec8<true>(slice.rows.at<T>(row) + column, out);
}

}  // namespace fused_cnn
