// fused_cnn::inception_fwd, inception_pack and inception_packed_fwd on the CPU: a whole Inception block, BatchNorm
// folded.
//   out = cat([relu(1x1(x)), relu(3x3(relu(1x1(x)))), relu(kxk(relu(1x1(x)))), relu(1x1(maxpool3x3(x)))])
// float32 and bfloat16: four engine calls. The three 1x1 convolutions of x are one call with three destinations: branch
// 1's slice of the output and the two reduction buffers; the others and the projection write straight into their
// slices. Other dtypes run on PyTorch's convolution (oneDNN), and its branches are concatenated.
#include "cpu/parallel.h"
#include "inception/checks.h"
#include "inception/cpu_block.h"

namespace fused_cnn {

EngineInception::EngineInception(const char* op, const Ints& sizes, DType dtype, const Tensor* packed,
                                 const Ints& channels, const Ints& kernels)
    : dtype_(dtype), element_(dtype == DType::f32 ? 4 : 2) {
  FUSED_CNN_CHECK(channels.size() == kConvolutions && kernels.size() == 2, op,
                  ": six channel counts and two kernel sizes are wanted, got ", channels.size(), " and ",
                  kernels.size());
  for (const int64_t c : channels) {
    FUSED_CNN_CHECK(c >= 1, op, ": channel counts must be at least 1, got ", c);
    FUSED_CNN_CHECK(c <= kLargestStep && addressable({sizes[0], c, sizes[2], sizes[3]}), op, ": a branch of ", c,
                    " channels is too large");
  }
  for (const int64_t k : kernels)
    FUSED_CNN_CHECK(k >= 1 && k <= kLargestStep && k % 2 == 1, op, ": kernel sizes must be odd, got ", k);
  const auto shape_of_conv = [&](int64_t in_channels, int64_t out_channels, int64_t kernel) {
    return conv_shape({sizes[0], in_channels, sizes[2], sizes[3]}, out_channels, {kernel, kernel},
                      same_padding(kernel));
  };
  merged_ = shape_of_conv(sizes[1], channels[kBranch1], 1);
  merged_.destinations = 3;
  merged_.out_channels[1] = channels[kReduce3];
  merged_.out_channels[2] = channels[kReduce5];
  convolutions_[0] = shape_of_conv(channels[kReduce3], channels[kConv3], kernels[0]);
  convolutions_[1] = shape_of_conv(channels[kReduce5], channels[kConv5], kernels[1]);
  convolutions_[2] = shape_of_conv(sizes[1], channels[kPoolProj], 1);
  for (int i = 0; packed != nullptr && i < 4; ++i) {
    check_packed(op, packed[i], i == 0 ? merged_ : convolutions_[i - 1], dtype);
    packed_[i] = packed[i].data_ptr();
  }
  pool_ = window_of(sizes, {3, 3}, same_padding(3));
  out = {sizes[0], channels[kBranch1] + channels[kConv3] + channels[kConv5] + channels[kPoolProj], sizes[2], sizes[3]};
  const int64_t pixels = sizes[0] * sizes[2] * sizes[3];
  const auto bytes_of = [&](int64_t of) { return (pixels * of * element_ + 63) / 64 * 64; };
  reduced3_bytes_ = bytes_of(channels[kReduce3]);
  // The pool is written where the reductions were.
  scratch_bytes = std::max(reduced3_bytes_ + bytes_of(channels[kReduce5]), bytes_of(sizes[1]));
}

void EngineInception::run(Rows x, Rows result, void* scratch) const {
  const Rows reduced3{scratch, merged_.out_channels[1]};
  const Rows reduced5{at(scratch, reduced3_bytes_, 1), merged_.out_channels[2]};
  engine::conv_forward(
      merged_, dtype_,
      {.x = x, .packed = packed_[0], .destination = {{.out = result}, {.out = reduced3}, {.out = reduced5}}});
  int64_t first = merged_.out_channels[0];  // of the next branch
  const auto convolve = [&](Rows from, int i) {
    const Rows to{at(result.data, first, element_), result.pitch};
    engine::conv_forward(convolutions_[i], dtype_, {.x = from, .packed = packed_[i + 1], .destination = {{.out = to}}});
    first += convolutions_[i].out_channels[0];
  };
  convolve(reduced3, 0);
  convolve(reduced5, 1);
  engine::max_pool(pool_, dtype_, x, scratch);
  convolve({scratch, pool_.C}, 2);
}

namespace {

constexpr int64_t kWorthPacking = 512;  // pixels; on fewer, packing plain weights costs more than it saves

std::vector<Tensor> inception_pack(std::vector<Tensor> weights, std::vector<Tensor> biases) {
  FUSED_CNN_CHECK(weights.size() == kConvolutions && biases.size() == kConvolutions,
                  "inception_pack: weights and biases must be six each, got ", weights.size(), " and ", biases.size());
  return {engine_pack({weights[kBranch1], weights[kReduce3], weights[kReduce5]},
                      {biases[kBranch1], biases[kReduce3], biases[kReduce5]}),
          engine_pack({weights[kConv3]}, {biases[kConv3]}), engine_pack({weights[kConv5]}, {biases[kConv5]}),
          engine_pack({weights[kPoolProj]}, {biases[kPoolProj]})};
}

Tensor inception_packed_fwd(const Tensor& x, std::vector<Tensor> packed, Ints channels, Ints kernels) {
  const char* op = "inception_packed_fwd";
  check_4d(op, "x", x);
  FUSED_CNN_CHECK(packed.size() == 4, op, ": four packed weights are wanted, got ", packed.size());
  const EngineInception block(op, sizes_of(x), engine_dtype(op, x), packed.data(), channels, kernels);
  const RowResult out(x, block.out[1], result_format(x));
  if (out.tensor.numel() > 0) {
    const RowView in = rows_of(x);
    block.run(in, out, Scratch(block.scratch_bytes).data());
  }
  return out.finish();
}

Tensor inception_fwd(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases) {
  const char* op = "inception_fwd";
  check_inception(op, x, weights, biases);
  const auto conv = [&](const Tensor& from, int i) {
    return cpu_conv_forward(op, from, weights[i], biases[i], std::nullopt, same_padding(weights[i].size(2)), true);
  };
  if (engine_supports(x) && x.numel() >= kWorthPacking * x.size(1)) {
    Ints channels;
    for (const Tensor& w : weights) channels.push_back(w.size(0));
    return inception_packed_fwd(x, inception_pack(weights, biases), channels,
                                {weights[kConv3].size(2), weights[kConv5].size(2)});
  }
  const std::vector<Tensor> branches{
      conv(x, kBranch1), conv(conv(x, kReduce3), kConv3), conv(conv(x, kReduce5), kConv5),
      conv(aten_max_pool2d(x, {3, 3}, {1, 1}, {1, 1}, {1, 1}, /*ceil_mode=*/false), kPoolProj)};
  const auto joined = call_operator("aten::cat", "", branches, /*dim=*/int64_t{1});
  return dense(torch::stable::detail::to<Tensor>(joined[0]), result_format(x));
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("inception_fwd", FUSED_CNN_BOX(&fused_cnn::inception_fwd));
  m.impl("inception_pack", FUSED_CNN_BOX(&fused_cnn::inception_pack));
  m.impl("inception_packed_fwd", FUSED_CNN_BOX(&fused_cnn::inception_packed_fwd));
}
