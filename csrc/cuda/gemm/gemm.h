// Matrix products of 16-bit matrices on tensor cores, accumulated in float32, as the rooms see them. The kernels are
// CUTLASS's main loops under one epilogue of our own (epilogue.cuh): warp-specialised with TMA and wgmma on sm_90a,
// multistage with mma.sync elsewhere.
#pragma once
#include <cuda_runtime.h>
#include "shared/branches.h"

namespace fused_cnn {

// Columns of the result that go to one place. Their number is a multiple of 8, and all rows here lie on 16 bytes.
struct GemmSlice {
  Rows rows;
  int columns;
};

constexpr int kGemmSlices = 3;

// result = relu(product + bias + residual); what is null is left out. The columns go to the slices in order.
struct GemmEpilogue {
  const void* bias;
  Rows residual;
  bool relu;
  int slices;
  GemmSlice slice[kGemmSlices];
  int64_t batch_stride;  // elements between the results of a batch
};

enum class GemmKind {
  forward,  // a (m, k) times b (n, k) transposed: result (m, n) of the operands' type
  wgrad     // split-K: a (k, m) transposed times b (k, n), one result (m, n) in float32 for each part of a batch
};

// `batch` products: a and b move on by so many elements from one to the next. m, n and k are multiples of 8 where they
// lie along rows. `tile` is the index of the forward product's tile in kGemmTiles.
struct Gemm {
  GemmKind kind;
  int tile;
  DType dtype;
  Rows a, b;
  int64_t a_batch_stride, b_batch_stride;
  int m, n, k, batch;
  GemmEpilogue epilogue;
};

// A tile size of the forward product: a candidate, which has an instance on every architecture. Where nothing was
// measured, the first in order whose predicate holds runs. `measured` is what put it there: shape, figure, GPU, date.
struct GemmTile {
  int m, n, k;
  bool (*when)(const Gemm& gemm, int multiprocessors);
  const char* measured;
};

inline constexpr GemmTile kGemmTiles[] = {
    {.m = 128,
     .n = 128,
     .k = 64,
     .when =
         [](const Gemm& gemm, int multiprocessors) {
           const int64_t tiles = (int64_t{gemm.m} + 127) / 128 * ((int64_t{gemm.n} + 127) / 128);
           return gemm.n > 64 && tiles >= 2 * multiprocessors;
         },
     .measured = "(802816, 64) x (64, 256) + residual, bfloat16: 1182 us, cuDNN 467 us; H200, 2026-11-26"},
    {.m = 64,
     .n = 64,
     .k = 64,
     .when = [](const Gemm&, int) { return true; },
     .measured = "(802816, 256) x (256, 64), bfloat16: 151 us, cuDNN 136 us; H200, 2026-11-26"},
};
constexpr int kGemmTileCount = sizeof(kGemmTiles) / sizeof(kGemmTiles[0]);

// The tile that a forward product runs with (cuda/choices.cu).
int gemm_tile(const Gemm& gemm, int device, int multiprocessors);

// Launches it; the error says why it could not be.
cudaError_t gemm_sm80_bf16(const Gemm& gemm, int multiprocessors, cudaStream_t stream);
cudaError_t gemm_sm80_f16(const Gemm& gemm, int multiprocessors, cudaStream_t stream);
cudaError_t gemm_sm90a_bf16(const Gemm& gemm, int multiprocessors, cudaStream_t stream);
cudaError_t gemm_sm90a_f16(const Gemm& gemm, int multiprocessors, cudaStream_t stream);

}  // namespace fused_cnn
