// The products and convolutions of cuda/gemm/gemm.h: in place of CUTLASS's such as follow, and our own. A warp of a
// product takes 16 rows and 32 columns and leaves them in its threads as tensor cores do, then comes the epilogue of
// sm_80's; it finds the weights of several slices where sm_90a's does. Of float32, which sm_80's does not take, a
// thread takes a row, and operands are rounded to TF32 as TMA does.
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/sm90a_split.cuh"
#include "cuda/gemm/tiles.h"

extern "C" int simt_gemm_tile;
int simt_gemm_tile = -1;  // of the last product or convolution, its place in kTiles

namespace fused_cnn {
namespace {

constexpr Tile kTiles[] = {
    {TileKind::product, 128, 128, 64, kSm80Tiles[0].when, ""},
    {TileKind::product, 64, 64, 64, tiles::always, ""},
    {TileKind::stem, 112, 64, 16, [](const Problem& problem, int) { return problem.scope != 0; }, ""},
    {TileKind::pooled_product, 256, 128, 64, tiles::always, ""},
    {TileKind::space_to_depth, 128, 64, 64, tiles::always, ""},
    {TileKind::split, 64, 64, 64, [](const Problem& problem, int) { return problem.stride > 1; }, ""},
    {TileKind::convolution, 128, 64, 64, tiles::always, ""},
    {TileKind::product, 128, 128, 32, tiles::always, ""},
    {TileKind::convolution, 128, 64, 32, tiles::always, ""},
    {TileKind::branches, 0, 0, 0, tiles::always, ""},
    {TileKind::library, 0, 0, 0, tiles::always, ""},
};

template <typename T>
float operand(T value) {
  return to_compute(value);
}
float operand(float value) {
  const uint32_t u = detail::bit_cast<uint32_t>(value);
  return detail::bit_cast<float>((u & 0x7fffffffu) < 0x7f800000u ? (u + 0x0fffu + (u >> 13 & 1)) & ~0x1fffu : u);
}

// The rest of a result's element, without sm_80's epilogue.
template <typename T>
void finish(const GemmEpilogue& epilogue, float sum, int64_t row, int column) {
  if (epilogue.bias) sum += to_compute(static_cast<const T*>(epilogue.bias)[column]);
  if (epilogue.residual.data) sum += to_compute(epilogue.residual.at<const T>(row)[column]);
  int s = 0;
  for (; column >= epilogue.slice[s].columns; ++s) column -= epilogue.slice[s].columns;
  from_compute(epilogue.relu ? relu(sum) : sum, epilogue.slice[s].rows.at<T>(row) + column);
}

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

__global__ void float_product_kernel(Gemm gemm) {
  for (int column = 0; column < gemm.n; ++column) {
    const float* a = gemm.a.at<const float>(blockIdx.x);
    const float* b = gemm.b.at<const float>(row_of(gemm, column));
    float sum = 0;
    for (int k = 0; k < gemm.k; ++k) sum += operand(a[k]) * operand(b[k]);
    finish<float>(gemm.epilogue, sum, blockIdx.x, column);
  }
}

template <typename T>
cudaError_t product(const Gemm& gemm) {
  simt_gemm_tile = static_cast<int>(gemm.tile - kTiles);
  cudaLaunchConfig_t config{};
  if constexpr (std::is_same_v<T, float>) {
    config.gridDim = dim3(gemm.m);
    return cudaLaunchKernelEx(&config, float_product_kernel, gemm);
  } else {
    config.gridDim = dim3((gemm.m + 15) / 16, (gemm.n + 31) / 32);
    config.blockDim = dim3(32);
    return cudaLaunchKernelEx(&config, product_kernel<T>, gemm);
  }
}

// One thread a pixel of the result.
template <typename T>
__global__ void convolution_kernel(Convolution conv, int height, int width) {
  const int64_t row = blockIdx.x;
  const int64_t image = row / (height * width);
  const int y = row / width % height * conv.stride[0] - conv.padding[0],
            x = row % width * conv.stride[1] - conv.padding[1];
  for (int o = 0; o < conv.outputs; ++o) {
    float sum = 0;
    const T* weight = static_cast<const T*>(conv.weight) + int64_t{o} * conv.kernel[0] * conv.kernel[1] * conv.inputs;
    for (int i = 0; i < conv.kernel[0]; ++i) {
      for (int j = 0; j < conv.kernel[1]; ++j) {
        const int in_y = y + i * conv.dilation[0], in_x = x + j * conv.dilation[1];
        if (in_y < 0 || in_y >= conv.size[0] || in_x < 0 || in_x >= conv.size[1]) continue;
        const T* pixel = static_cast<const T*>(conv.x) + image * conv.image + in_y * conv.row + in_x * conv.pixel;
        const T* tap = weight + (i * conv.kernel[1] + j) * conv.inputs;
        for (int c = 0; c < conv.inputs; ++c) sum += operand(pixel[c]) * operand(tap[c]);
      }
    }
    finish<T>(conv.epilogue, sum, row, o);
  }
}

template <typename T>
cudaError_t convolution(const Convolution& conv, int multiprocessors, cudaStream_t stream) {
  simt_gemm_tile = static_cast<int>(conv.tile - kTiles);
  if constexpr (!std::is_same_v<T, float>) {
    if (conv.tile->kind == TileKind::split) return sm90a_split<T, 64, 64>(conv, multiprocessors, stream);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(conv.images * conv.result_size(0) * conv.result_size(1));
  return cudaLaunchKernelEx(&config, convolution_kernel<T>, conv, conv.result_size(0), conv.result_size(1));
}

template <typename Body>
cudaError_t with_operands(DType dtype, const Body& body) {
  return dtype == DType::f32 ? body(float{}) : dtype == DType::f16 ? body(f16_t{}) : body(bf16_t{});
}

constexpr TensorCores kCores{
    .tiles = kTiles,
    .slice_step = kSliceStep,
    .product =
        [](const Gemm& gemm, int, cudaStream_t) {
          return with_operands(gemm.dtype, [&](auto element) { return product<decltype(element)>(gemm); });
        },
    .convolution =
        [](const Convolution& conv, int multiprocessors, cudaStream_t stream) {
          return with_operands(
              conv.dtype, [&](auto element) { return convolution<decltype(element)>(conv, multiprocessors, stream); });
        },
};

}  // namespace

const TensorCores* tensor_cores(int) {
  return &kCores;
}

}  // namespace fused_cnn
