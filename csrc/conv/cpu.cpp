// fused_cnn::conv_bias_relu_fwd, _bwd, _pack and _packed_fwd on the CPU, for kernels of any size; see cpu/conv.h.
#include "conv/backward.h"
#include "cpu/conv.h"

namespace fused_cnn {

namespace {

Tensor conv_bias_relu_fwd(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                          std::optional<Tensor> residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
                          bool relu) {
  const char* op = "conv_bias_relu_fwd";
  return cpu_conv_forward(op, x, weight, bias, residual, conv_params(op, stride, padding, dilation, groups), relu);
}

Tensor conv_bias_relu_pack(const Tensor& weight, std::optional<Tensor> bias, Ints stride, Ints dilation) {
  const char* op = "conv_bias_relu_pack";
  return engine_pack({weight}, {bias}, pair_of(op, "stride", stride), pair_of(op, "dilation", dilation));
}

// The same of a packed weight, on the engine.
Tensor conv_bias_relu_packed_fwd(const Tensor& x, const Tensor& packed, Ints weight_shape,
                                 std::optional<Tensor> residual, Ints stride, Ints padding, Ints dilation, bool relu) {
  const char* op = "conv_bias_relu_packed_fwd";
  check_4d(op, "x", x);
  const DType dtype = engine_dtype(op, x);
  FUSED_CNN_CHECK(weight_shape.size() == 4 && weight_shape[0] >= 1, op,
                  ": the weight's shape must be four numbers, and of at least 1 output channel");
  FUSED_CNN_CHECK(weight_shape[1] == x.size(1), op, ": x has shape ", shape_of(x), ", but the weight takes ",
                  weight_shape[1], " input channels");
  const Pair kernel{weight_shape[2], weight_shape[3]};
  const ConvParams params = conv_params(op, stride, padding, dilation, /*groups=*/1);
  check_geometry(op, x.size(2), x.size(3), kernel, params);
  const int64_t channels = weight_shape[0];
  const engine::ConvShape shape = conv_shape(sizes_of(x), channels, kernel, params);
  if (residual) check_result_shape(op, "residual", *residual, x, channels, shape.out.h, shape.out.w);
  check_packed(op, packed, shape, dtype);
  const Tensor out = empty_result(x, channels, shape.out.h, shape.out.w);
  if (out.numel() > 0) {
    const RowView in = rows_of(x), addend = rows_of(residual);
    const engine::Destination to{.out = {out.data_ptr(), channels}, .residual = addend, .relu = relu};
    engine::conv_forward(shape, dtype, {.x = in, .packed = packed.data_ptr(), .destination = {to}});
  }
  return dense(out, result_format(x));
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("conv_bias_relu_fwd", FUSED_CNN_BOX(&fused_cnn::conv_bias_relu_fwd));
  m.impl("conv_bias_relu_bwd", FUSED_CNN_BOX(&fused_cnn::conv_bias_relu_bwd));
  m.impl("conv_bias_relu_pack", FUSED_CNN_BOX(&fused_cnn::conv_bias_relu_pack));
  m.impl("conv_bias_relu_packed_fwd", FUSED_CNN_BOX(&fused_cnn::conv_bias_relu_packed_fwd));
}
