// fused_cnn::inception_fwd on CUDA: a whole Inception block, BatchNorm folded. The three 1x1 convolutions of x are one
// product with three destinations, branch 1's slice of the output and the two reductions; the pool's projection writes
// into its slice too. The k x k convolutions are cuDNN's, and one pass brings each, with bias and ReLU, into its slice.
#include "cuda/gemm/pointwise.cuh"
#include "inception/checks.h"

namespace fused_cnn {
namespace {

Tensor concatenated(const std::vector<Tensor>& tensors) {
  const auto found = call_operator("aten::cat", "", tensors, /*dim=*/int64_t{0});
  return dense(torch::stable::detail::to<Tensor>(found[0]), MemoryFormat::Contiguous);
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

  const Tensor reduced3 = empty_result(x, channels(kReduce3), x.size(2), x.size(3));
  const Tensor reduced5 = empty_result(x, channels(kReduce5), x.size(2), x.size(3));
  pointwise(x, rows_of(x), concatenated({weights[kBranch1], weights[kReduce3], weights[kReduce5]}),
            concatenated({biases[kBranch1], biases[kReduce3], biases[kReduce5]}), /*residual=*/{}, /*relu=*/true,
            {next_branch(kBranch1), slice(rows_of(reduced3), kReduce3), slice(rows_of(reduced5), kReduce5)});

  const auto convolve = [&](const Tensor& from, int i) {
    finish_convolution(aten_convolution(from, weights[i], std::nullopt, same_padding(weights[i].size(2))),
                       torch::stable::contiguous(biases[i]), /*residual=*/{}, /*relu=*/true, {next_branch(i)});
  };
  convolve(reduced3, kConv3);
  convolve(reduced5, kConv5);

  const Tensor pooled = aten_max_pool2d(x, /*kernel=*/{3, 3}, /*stride=*/{1, 1}, /*padding=*/{1, 1},
                                        /*dilation=*/{1, 1}, /*ceil_mode=*/false);
  pointwise(pooled, rows_of(pooled), dense(weights[kPoolProj], MemoryFormat::Contiguous),
            torch::stable::contiguous(biases[kPoolProj]), /*residual=*/{}, /*relu=*/true, {next_branch(kPoolProj)});
  return out.finish();
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("inception_fwd", FUSED_CNN_BOX(&fused_cnn::inception_fwd));
}
