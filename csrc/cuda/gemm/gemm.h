// Matrix products of 16-bit matrices on tensor cores, accumulated in float32, as the rooms see them. The kernels are
// CUTLASS's main loops under one epilogue of our own (epilogue.cuh): warp-specialised with TMA and wgmma on sm_90a,
// multistage with mma.sync elsewhere.
#pragma once
#include <cuda_runtime.h>
#include <cstdint>
#include "shared/dtype.h"

namespace fused_cnn {

// Rows of adjacent elements, `pitch` elements apart. Data and pitch lie on 16 bytes.
struct GemmMatrix {
  const void* data;
  int64_t pitch;
};

// Columns of the result that go to one place: to rows `pitch` elements apart. A multiple of 8.
struct GemmSlice {
  void* data;
  int64_t pitch;
  int columns;
};

constexpr int kGemmSlices = 3;

// result = relu(product + bias + residual); what is null is left out. The columns go to the slices in order.
struct GemmEpilogue {
  const void* bias;
  GemmMatrix residual;
  bool relu;
  int slices;
  GemmSlice slice[kGemmSlices];
  int64_t batch_stride;  // elements between the results of a batch
};

enum class GemmKind {
  wide,    // a (m, k) times b (n, k) transposed, in tiles of 128 columns: result (m, n) of the operands' type
  narrow,  // the same in tiles of 64
  sums     // a (k, m) transposed times b (k, n): result float32 (m, n)
};

// `batch` products: a and b move on by so many elements from one to the next. m, n and k are multiples of 8 where they
// lie along rows.
struct Gemm {
  GemmKind kind;
  DType dtype;
  GemmMatrix a, b;
  int64_t a_batch_stride, b_batch_stride;
  int m, n, k, batch;
  GemmEpilogue epilogue;
};

// Launches it; the error says why it could not be.
cudaError_t gemm_sm80_bf16(const Gemm& gemm, int multiprocessors, cudaStream_t stream);
cudaError_t gemm_sm80_f16(const Gemm& gemm, int multiprocessors, cudaStream_t stream);
cudaError_t gemm_sm90a_bf16(const Gemm& gemm, int multiprocessors, cudaStream_t stream);
cudaError_t gemm_sm90a_f16(const Gemm& gemm, int multiprocessors, cudaStream_t stream);

}  // namespace fused_cnn
