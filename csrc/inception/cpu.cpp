// fused_cnn::inception_fwd, inception_pack and inception_packed_fwd on the CPU: a whole Inception block, BatchNorm
// folded.
//   out = cat([relu(1x1(x)), relu(3x3(relu(1x1(x)))), relu(kxk(relu(1x1(x)))), relu(1x1(maxpool3x3(x)))])
// float32 and bfloat16: four engine calls. The three 1x1 convolutions of x are one call with three destinations: branch
// 1's slice of the output and the two reduction buffers; the others and the projection write straight into their
// slices. Other dtypes run on PyTorch's convolution (oneDNN), and its branches are concatenated.
#include "cpu/conv.h"
#include "inception/checks.h"

namespace fused_cnn {
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
  const DType dtype = engine_dtype(op, x);
  FUSED_CNN_CHECK(packed.size() == 4 && channels.size() == kConvolutions && kernels.size() == 2, op,
                  ": four packed weights, six channel counts and two kernel sizes are wanted, got ", packed.size(),
                  ", ", channels.size(), " and ", kernels.size());
  for (const int64_t c : channels) FUSED_CNN_CHECK(c >= 1, op, ": channel counts must be at least 1, got ", c);
  for (const int64_t k : kernels)
    FUSED_CNN_CHECK(k >= 1 && k <= kLargestStep && k % 2 == 1, op, ": kernel sizes must be odd, got ", k);

  const int64_t height = x.size(2), width = x.size(3);
  const auto shape_of_conv = [&](int64_t in_channels, int64_t out_channels, int64_t kernel) {
    return conv_shape({x.size(0), in_channels, height, width}, out_channels, {kernel, kernel}, same_padding(kernel));
  };
  const engine::ConvShape convolutions[] = {shape_of_conv(channels[kReduce3], channels[kConv3], kernels[0]),
                                            shape_of_conv(channels[kReduce5], channels[kConv5], kernels[1]),
                                            shape_of_conv(x.size(1), channels[kPoolProj], 1)};
  engine::ConvShape merged = shape_of_conv(x.size(1), channels[kBranch1], 1);
  merged.destinations = 3;
  merged.out_channels[1] = channels[kReduce3];
  merged.out_channels[2] = channels[kReduce5];
  check_packed(op, packed[0], merged, dtype);
  for (int i = 0; i < 3; ++i) check_packed(op, packed[i + 1], convolutions[i], dtype);

  const int64_t total = channels[kBranch1] + channels[kConv3] + channels[kConv5] + channels[kPoolProj];
  const RowResult out(x, total, result_format(x));
  const RowView in = rows_of(x), reduced3 = rows_of(empty_result(x, channels[kReduce3], height, width)),
                reduced5 = rows_of(empty_result(x, channels[kReduce5], height, width));
  engine::ConvArgs args{
      .x = in, .packed = packed[0].data_ptr(), .destination = {{.out = out}, {.out = reduced3}, {.out = reduced5}}};
  if (out.tensor.numel() > 0) engine::conv_forward(merged, dtype, args);
  int64_t first = channels[kBranch1];  // of the next branch
  const auto convolve = [&](const RowView& from, int i) {
    args = {.x = from, .packed = packed[i + 1].data_ptr(), .destination = {{.out = out.from(first)}}};
    if (out.tensor.numel() > 0) engine::conv_forward(convolutions[i], dtype, args);
    first += convolutions[i].out_channels[0];
  };
  convolve(reduced3, 0);
  convolve(reduced5, 1);
  const Tensor pooled = empty_like_4d(x, MemoryFormat::ChannelsLast);
  engine::max_pool(window_of(sizes_of(x), {3, 3}, same_padding(3)), dtype, in, pooled.data_ptr());
  convolve(rows_of(pooled), 2);
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
