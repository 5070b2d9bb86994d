// Matrix products and convolutions on tensor cores, accumulated in float32, as the rooms see them. The kernels are
// CUTLASS's: on sm_90a its main loops and its epilogue, with TMA and wgmma, of 16-bit types and, in TF32, of float32;
// elsewhere, of 16-bit types alone, its multistage loop with mma.sync under an epilogue of our own (epilogue.cuh).
#pragma once
#include <cuda_runtime.h>
#include <array>
#include "shared/branches.h"

namespace fused_cnn {

// How many elements lie in 16 bytes, in which TMA and the vectors of kernels move them.
constexpr int in_16_bytes(DType dtype) {
  return dtype == DType::f64 ? 2 : dtype == DType::f32 ? 4 : 8;
}

// Columns of the result that go to one place. They are whole units of 16 bytes, on which all rows here lie.
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

// a (m, k) times b (n, k) transposed: (m, n). n and k are whole units of 16 bytes.
struct Gemm {
  const Tile* tile;
  DType dtype;
  Rows a, b;
  int m, n, k;
  GemmEpilogue epilogue;
};

// A convolution of images of `size` pixels of x, so many elements apart, with weight (outputs, kernel, inputs), all
// adjacent; the result is one slice. inputs, outputs and the distances are whole units of 16 bytes.
struct Convolution {
  const Tile* tile;
  DType dtype;
  const void* x;
  int64_t pixel, row, image;
  const void* weight;
  int images, inputs, outputs;
  std::array<int, 2> size, kernel, stride, padding, dilation;
  GemmEpilogue epilogue;

  int result_size(int axis) const {
    return (size[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
  }
};

}  // namespace fused_cnn
