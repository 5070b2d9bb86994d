// fused_cnn::inception_fwd on CUDA: a whole Inception block, BatchNorm folded. The three 1x1 convolutions of x are one
// product with three destinations, branch 1's slice of the output and the two reductions; the pool's projection writes
// into its slice too. The k x k convolutions are the library's, and one pass brings each, with bias and ReLU, into its
// slice.
#include "cuda/gemm/pointwise.cuh"
#include "inception/checks.h"

namespace fused_cnn {
namespace {

Tensor concatenated(const std::vector<Tensor>& tensors) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(tensors), from(int64_t{0})};
  call_operator("aten::cat", "", stack);
  return dense(torch::stable::detail::to<Tensor>(stack[0]), MemoryFormat::Contiguous);
}

Tensor inception_fwd(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases) {
  const char* op = "inception_fwd";
  check_inception(op, x, weights, biases);
  dtype_of(op, "x", x);  // refuses others
  const Launch launch(x);
  const int64_t rows = row_count(x), size = x.element_size();
  const auto channels = [&](int i) { return weights[i].size(0); };
  const int64_t total = channels(kBranch1) + channels(kConv3) + channels(kConv5) + channels(kPoolProj);
  const RowResult out(x, total, result_format(x));
  char* slice = static_cast<char*>(out.data);
  const auto next = [&](int i) {
    const GemmSlice here{slice, total, static_cast<int>(channels(i))};
    slice += channels(i) * size;
    return here;
  };

  const Tensor reduced3 = empty_rows(x, channels(kReduce3), x.size(2), x.size(3));
  const Tensor reduced5 = empty_rows(x, channels(kReduce5), x.size(2), x.size(3));
  const auto whole = [&](const Tensor& t) { return GemmSlice{t.data_ptr(), t.size(1), static_cast<int>(t.size(1))}; };
  pointwise(launch, x, rows_of(x), concatenated({weights[kBranch1], weights[kReduce3], weights[kReduce5]}),
            concatenated({biases[kBranch1], biases[kReduce3], biases[kReduce5]}), nullptr, true,
            {next(kBranch1), whole(reduced3), whole(reduced5)});

  const auto convolve = [&](const Tensor& from, int i) {
    const GemmSlice to = next(i);
    if (rows == 0) return;
    finish_convolution(launch, library_conv(from, weights[i], std::nullopt, same_padding(weights[i].size(2))),
                       torch::stable::contiguous(biases[i]), nullptr, true, {to});
  };
  convolve(reduced3, kConv3);
  convolve(reduced5, kConv5);

  const GemmSlice last = next(kPoolProj);
  if (rows > 0) {
    const Tensor pooled = library_max_pool2d(x, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false);
    pointwise(launch, pooled, rows_of(pooled), dense(weights[kPoolProj], MemoryFormat::Contiguous),
              torch::stable::contiguous(biases[kPoolProj]), nullptr, true, {last});
  }
  return out.finish();
}

}  // namespace
}  // namespace fused_cnn

FUSED_CNN_CUDA_IMPL(m) {
  m.impl("inception_fwd", FUSED_CNN_BOX(&fused_cnn::inception_fwd));
}
