// Matrix products and convolutions of 16-bit types on tensor cores, accumulated in float32, as the rooms see them. The
// kernels are CUTLASS's: on sm_90a its main loops and its epilogue, with TMA and wgmma; elsewhere its multistage loop
// with mma.sync under an epilogue of our own (epilogue.cuh).
#pragma once
#include <cuda_runtime.h>
#include <array>
#include "shared/branches.h"

namespace fused_cnn {

// Columns of the result that go to one place. Their number is a multiple of 8, and all rows here lie on 16 bytes.
struct GemmSlice {
  Rows rows;
  int columns;
};

constexpr int kGemmSlices = 3;
constexpr int kSliceStep = 128;  // a multiple of the columns of every tile that takes several slices on sm_90a

// result = relu(product + bias + residual); what is null is left out. The columns go to the slices in order.
struct GemmEpilogue {
  const void* bias;
  Rows residual;
  bool relu;
  int slices;
  GemmSlice slice[kGemmSlices];
};

struct Tile;  // tiles.h

// a (m, k) times b (n, k) transposed: (m, n). n and k are multiples of 8.
struct Gemm {
  const Tile* tile;
  DType dtype;
  Rows a, b;
  int m, n, k;
  GemmEpilogue epilogue;
};

// A convolution of images of `size` pixels of x, so many elements apart, with weight (outputs, kernel, inputs), all
// adjacent; the result is one slice. inputs, outputs and the distances are multiples of 8.
struct Convolution {
  const Tile* tile;
  DType dtype;
  const void* x;
  int64_t pixel, row, image;
  const void* weight;
  int images, inputs, outputs;
  std::array<int, 2> size, kernel, stride, padding, dilation;
  GemmEpilogue epilogue;
};

}  // namespace fused_cnn
