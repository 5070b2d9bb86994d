// The products and convolutions of cuda/gemm/gemm.h in place of CUTLASS's. A warp of a product takes 16 rows and 32
// columns and leaves them in its threads as tensor cores do, then comes the epilogue of sm_80's; it finds the weights
// of several slices where sm_90a's does.
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/tiles.h"

extern "C" int simt_gemm_tile;
int simt_gemm_tile = -1;  // of the last product or convolution, its place in kTiles

namespace fused_cnn {
namespace {

constexpr Tile kTiles[] = {
    {TileKind::product, 128, 128, 64, kSm80Tiles[0].when, ""},
    {TileKind::product, 64, 64, 64, tiles::always, ""},
    {TileKind::stem, 112, 64, 16, [](const Problem& problem, int) { return problem.pooled != 0; }, ""},
    {TileKind::pooled_product, 256, 128, 64, tiles::always, ""},
    {TileKind::space_to_depth, 128, 64, 64, tiles::always, ""},
    {TileKind::convolution, 128, 64, 64, tiles::always, ""},
    {TileKind::library, 0, 0, 0, tiles::always, ""},
};

// Where b has the weights of a column of the result.
int64_t row_of(const Gemm& gemm, int column) {
  int64_t first = 0;
  for (int s = 0; s + 1 < gemm.epilogue.slices && column >= gemm.epilogue.slice[s].columns; ++s) {
    column -= gemm.epilogue.slice[s].columns;
    first += (gemm.epilogue.slice[s].columns + kSliceStep - 1) / kSliceStep * kSliceStep;
  }
  return first + column;
}

template <typename T>
__global__ void product_kernel(Gemm gemm) {
  const auto at = [](const Rows& matrix, int64_t row, int64_t column) {
    return to_compute(matrix.at<const T>(row)[column]);
  };
  for (int j = 0; j < 2; ++j) {
    const int64_t row = blockIdx.x * 16 + threadIdx.x / 4 + 8 * j;
    float pairs[4][2] = {};
    int columns[4];
    for (int o = 0; o < 4; ++o) {
      columns[o] = static_cast<int>(blockIdx.y * 32 + 8 * o);
      for (int i = 0; i < 2; ++i) {
        const int64_t column = columns[o] + 2 * (threadIdx.x % 4) + i;
        if (row >= gemm.m || column >= gemm.n) continue;
        for (int k = 0; k < gemm.k; ++k) {
          pairs[o][i] += at(gemm.a, row, k) * at(gemm.b, row_of(gemm, column), k);
        }
      }
    }
    epilogue_store<T>(gemm.epilogue, pairs, row, columns, gemm.m, gemm.n);
  }
}

template <typename T>
cudaError_t product(const Gemm& gemm) {
  simt_gemm_tile = static_cast<int>(gemm.tile - kTiles);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((gemm.m + 15) / 16, (gemm.n + 31) / 32);
  config.blockDim = dim3(32);
  return cudaLaunchKernelEx(&config, product_kernel<T>, gemm);
}

// One thread a pixel of the result.
template <typename T>
__global__ void convolution_kernel(Convolution conv, int height, int width) {
  const int64_t row = blockIdx.x;
  const int64_t image = row / (height * width);
  const int y = row / width % height * conv.stride[0] - conv.padding[0],
            x = row % width * conv.stride[1] - conv.padding[1];
  const GemmEpilogue& epilogue = conv.epilogue;
  for (int o = 0; o < conv.outputs; ++o) {
    float sum = 0;
    const T* weight = static_cast<const T*>(conv.weight) + int64_t{o} * conv.kernel[0] * conv.kernel[1] * conv.inputs;
    for (int i = 0; i < conv.kernel[0]; ++i) {
      for (int j = 0; j < conv.kernel[1]; ++j) {
        const int in_y = y + i * conv.dilation[0], in_x = x + j * conv.dilation[1];
        if (in_y < 0 || in_y >= conv.size[0] || in_x < 0 || in_x >= conv.size[1]) continue;
        const T* pixel = static_cast<const T*>(conv.x) + image * conv.image + in_y * conv.row + in_x * conv.pixel;
        const T* tap = weight + (i * conv.kernel[1] + j) * conv.inputs;
        for (int c = 0; c < conv.inputs; ++c) sum += to_compute(pixel[c]) * to_compute(tap[c]);
      }
    }
    if (epilogue.bias) sum += to_compute(static_cast<const T*>(epilogue.bias)[o]);
    if (epilogue.residual.data) sum += to_compute(epilogue.residual.at<const T>(row)[o]);
    from_compute(epilogue.relu ? relu(sum) : sum, epilogue.slice[0].rows.at<T>(row) + o);
  }
}

template <typename T>
cudaError_t convolution(const Convolution& conv) {
  const auto size = [&](int axis) {
    return (conv.size[axis] + 2 * conv.padding[axis] - conv.dilation[axis] * (conv.kernel[axis] - 1) - 1) /
               conv.stride[axis] +
           1;
  };
  simt_gemm_tile = static_cast<int>(conv.tile - kTiles);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(conv.images * size(0) * size(1));
  return cudaLaunchKernelEx(&config, convolution_kernel<T>, conv, size(0), size(1));
}

constexpr TensorCores kCores{
    .tiles = kTiles,
    .slice_step = kSliceStep,
    .product = [](const Gemm& gemm, int,
                  cudaStream_t) { return gemm.dtype == DType::f16 ? product<f16_t>(gemm) : product<bf16_t>(gemm); },
    .convolution =
        [](const Convolution& conv, cudaStream_t) {
          return conv.dtype == DType::f16 ? convolution<f16_t>(conv) : convolution<bf16_t>(conv);
        },
};

}  // namespace

const TensorCores* tensor_cores(int) {
  return &kCores;
}

}  // namespace fused_cnn
