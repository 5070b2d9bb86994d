// The products of cuda/gemm/gemm.h in place of CUTLASS's: a warp takes 16 rows and 32 columns and leaves them in its
// threads as tensor cores do, then comes the epilogue of the real ones.
#include "cuda/gemm/epilogue.cuh"

extern "C" int simt_gemm_tile;
int simt_gemm_tile = -1;  // of the last forward product

namespace fused_cnn {
namespace {

template <typename T, typename Out>
__global__ void product_kernel(Gemm gemm) {
  const int64_t batch = blockIdx.z;
  const auto at = [](const Rows& matrix, int64_t row, int64_t column) {
    return to_compute(matrix.at<const T>(row)[column]);
  };
  const Rows a{gemm.a.at<T>(0) + batch * gemm.a_batch_stride, gemm.a.pitch};
  const Rows b{gemm.b.at<T>(0) + batch * gemm.b_batch_stride, gemm.b.pitch};
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
          pairs[o][i] +=
              gemm.kind == GemmKind::wgrad ? at(a, k, row) * at(b, k, column) : at(a, row, k) * at(b, column, k);
        }
      }
    }
    epilogue_store<T, Out>(gemm.epilogue, pairs, row, columns, gemm.m, gemm.n, batch);
  }
}

template <typename T>
cudaError_t product(const Gemm& gemm) {
  simt_gemm_tile = gemm.tile;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((gemm.m + 15) / 16, (gemm.n + 31) / 32, gemm.batch);
  config.blockDim = dim3(32);
  return cudaLaunchKernelEx(&config, gemm.kind == GemmKind::wgrad ? product_kernel<T, float> : product_kernel<T, T>,
                            gemm);
}

}  // namespace

cudaError_t gemm_sm80_bf16(const Gemm& gemm, int, cudaStream_t) {
  return product<bf16_t>(gemm);
}

cudaError_t gemm_sm80_f16(const Gemm& gemm, int, cudaStream_t) {
  return product<f16_t>(gemm);
}

}  // namespace fused_cnn
