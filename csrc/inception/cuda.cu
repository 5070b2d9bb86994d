// fused_cnn::inception_fwd and inception_packed_fwd on CUDA: a whole Inception block, BatchNorm folded. The three 1x1
// convolutions of x are one product with three destinations, branch 1's slice of the output and the two reductions; the
// pool's projection, in one kernel with the pool where that is faster, writes into its slice too, and so do the k x k
// convolutions (cuda/convolve.h). In a CUDA graph the last branch may run beside all others, and the 5x5 one beside the
// 3x3 one.
#include "cuda/convolve.h"
#include "cuda/max_pool.h"
#include "cuda/pooled_pointwise.h"
#include "cuda/side_streams.cuh"
#include "inception/checks.h"

namespace fused_cnn {
namespace {

// Whether the pool and its projection are one kernel; else the projection is a problem of its own.
bool runs_pooled(const Tensor& x, const GemmSlice& out) {
  const DType dtype = dtype_of("inception", "x", x);
  if (!gemm_supports(dtype, row_count(x), x.size(1), out.columns) || out.columns % 8 != 0 ||
      !aligned16(out.rows, x.element_size())) {
    return false;
  }
  const GemmKernels kernels(x.get_device_index());
  if (!kernels) return false;
  const Problem problem{.device = kernels.device,
                        .dtype = static_cast<int64_t>(dtype),
                        .m = row_count(x),
                        .n = out.columns,
                        .k = x.size(1),
                        .residual = 0,
                        .slices = 1,
                        .kernel_height = 1,
                        .kernel_width = 1,
                        .stride = 1,
                        .library_takes_all = 0,
                        .scope = kPoolBefore};
  return kernels.tile_for(problem).kind == TileKind::pooled_product;
}

// Whether the branches may run beside each other.
bool runs_beside(const Tensor& x, int64_t outputs, const std::vector<Tensor>& weights) {
  const DType dtype = dtype_of("inception", "x", x);
  if (!tensor_cores_take(dtype)) return false;
  const GemmKernels kernels(x.get_device_index());
  if (!kernels) return false;
  const Problem problem{.device = kernels.device,
                        .dtype = static_cast<int64_t>(dtype),
                        .m = row_count(x),
                        .n = outputs,
                        .k = x.size(1),
                        .residual = 0,
                        .slices = 4,
                        .kernel_height = weights[kConv3].size(2),
                        .kernel_width = weights[kConv5].size(2),
                        .stride = 1,
                        .library_takes_all = 0,
                        .scope = kBlock};
  return kernels.tile_for(problem).kind == TileKind::branches;
}

Tensor inception_fwd(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases) {
  const char* op = "inception_fwd";
  check_inception(op, x, weights, biases);
  dtype_of(op, "x", x);  // refuses others
  const auto channels = [&](int i) { return weights[i].size(0); };
  const int64_t total = channels(kBranch1) + channels(kConv3) + channels(kConv5) + channels(kPoolProj);
  const RowResult out(x, total, result_format(x));
  if (row_count(x) == 0) return out.finish();
  const auto slice = [&](const Rows& rows, int i) { return GemmSlice{rows, static_cast<int>(channels(i))}; };
  int64_t first = 0;
  const auto next_branch = [&](int i) {
    const GemmSlice here = slice(out.from(first), i);
    first += channels(i);
    return here;
  };
  const GemmSlice branch1 = next_branch(kBranch1), branch3 = next_branch(kConv3), branch5 = next_branch(kConv5),
                  projected = next_branch(kPoolProj);
  const auto branch = [&](const Tensor& from, int i, const GemmSlice& to) {
    const ConvParams params = same_padding(weights[i].size(2));
    const std::array<int64_t, 2> size{x.size(2), x.size(3)};
    const Tile* tile = tile_of(from, weights[i], params, /*residual=*/false, /*relu=*/true, size, /*own=*/false);
    convolve(from, weights[i], dense_vector(biases[i]), /*residual=*/{}, params, /*relu=*/true, size, to, tile);
  };

  const Tensor reduced3 = empty_result(x, channels(kReduce3), x.size(2), x.size(3));
  const Tensor reduced5 = empty_result(x, channels(kReduce5), x.size(2), x.size(3));
  const RowView in = rows_of(x);
  SideStreams streams(x.get_device_index(), runs_beside(x, total, weights));
  streams.beside([&] {
    if (runs_pooled(x, projected)) {
      return run_pooled_pointwise(x, on_16_bytes(in), on_16_bytes(dense(weights[kPoolProj], MemoryFormat::Contiguous)),
                                  on_16_bytes(dense_vector(biases[kPoolProj])), projected);
    }
    const Tensor pooled = empty_result(x, x.size(1), x.size(2), x.size(3));
    max_pool(x, in, pooled, {.kernel = {3, 3}, .stride = {1, 1}, .padding = {1, 1}, .dilation = {1, 1}});
    branch(pooled, kPoolProj, projected);
  });
  pointwise(x, in, {weights[kBranch1], weights[kReduce3], weights[kReduce5]},
            {biases[kBranch1], biases[kReduce3], biases[kReduce5]}, /*residual=*/{}, /*relu=*/true,
            {branch1, slice(rows_of(reduced3), kReduce3), slice(rows_of(reduced5), kReduce5)});
  streams.beside([&] { branch(reduced5, kConv5, branch5); });
  branch(reduced3, kConv3, branch3);
  streams.join();
  return out.finish();
}

// The same of what pack_inception in Python made once: the six weights, then the six biases, as inception_fwd likes
// them best. `channels` and `kernels` say again what their shapes do.
Tensor inception_packed_fwd(const Tensor& x, std::vector<Tensor> packed, Ints channels, Ints kernels) {
  const char* op = "inception_packed_fwd";
  FUSED_CNN_CHECK(packed.size() == 2 * kConvolutions && channels.size() == kConvolutions && kernels.size() == 2, op,
                  ": six weights and six biases, six channel counts and two kernel sizes are wanted, got ",
                  packed.size(), ", ", channels.size(), " and ", kernels.size());
  const std::vector<Tensor> weights(packed.begin(), packed.begin() + kConvolutions);
  for (int i = 0; i < kConvolutions; ++i) {
    check_4d(op, "weight", weights[i]);
    const int64_t kernel = i == kConv3 ? kernels[0] : i == kConv5 ? kernels[1] : 1;
    FUSED_CNN_CHECK(weights[i].size(0) == channels[i] && weights[i].size(2) == kernel, op, ": weight ", i,
                    " must have ", channels[i], " outputs and a kernel of ", kernel, ", got shape ",
                    shape_of(weights[i]));
  }
  return inception_fwd(x, weights, {packed.begin() + kConvolutions, packed.end()});
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("inception_fwd", FUSED_CNN_BOX(&fused_cnn::inception_fwd));
  m.impl("inception_packed_fwd", FUSED_CNN_BOX(&fused_cnn::inception_packed_fwd));
}
