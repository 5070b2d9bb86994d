// See conv.h.
#include "cpu/conv.h"
#include "cpu/memory.h"

namespace fused_cnn {

bool engine_supports(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16;
}

DType engine_dtype(const char* op, const Tensor& x) {
  FUSED_CNN_CHECK(engine_supports(x), op, ": x must be float32 or bfloat16, got ",
                  torch::headeronly::toString(x.scalar_type()));
  return dtype_of(op, "x", x);
}

engine::Window window_of(const Ints& sizes, const Ints& kernel, const ConvParams& p) {
  return {.N = sizes[0],
          .C = sizes[1],
          .H = sizes[2],
          .W = sizes[3],
          .kernel = {kernel[0], kernel[1]},
          .stride = {p.stride[0], p.stride[1]},
          .pad = {p.padding[0], p.padding[1]},
          .dilation = {p.dilation[0], p.dilation[1]},
          .out = {conv_out_size(sizes[2], kernel, p, 0), conv_out_size(sizes[3], kernel, p, 1)}};
}

engine::ConvShape conv_shape(const Ints& sizes, int64_t out_channels, const Ints& kernel, const ConvParams& p) {
  engine::ConvShape shape{window_of(sizes, kernel, p)};
  shape.out_channels[0] = out_channels;
  shape.batch = shape.N;
  return shape;
}

Tensor engine_pack(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                   const Ints& stride, const Ints& dilation) {
  const char* op = "conv_pack";
  FUSED_CNN_CHECK(!weights.empty() && weights.size() <= engine::kMaxDestinations && weights.size() == biases.size(), op,
                  ": between 1 and ", engine::kMaxDestinations, " weights with as many biases, got ", weights.size());
  for (const Ints& steps : {stride, dilation})
    FUSED_CNN_CHECK(steps.size() == 2 && steps[0] >= 1 && steps[1] >= 1, op,
                    ": stride and dilation must be two values of at least 1 each");
  const Tensor& first = weights[0];
  check_4d(op, "weight", first);
  FUSED_CNN_CHECK(engine_supports(first), op, ": weight must be float32 or bfloat16");
  const DType dtype = dtype_of(op, "weight", first);
  engine::ConvShape shape = conv_shape({0, first.size(1), 0, 0}, 0, {first.size(2), first.size(3)},
                                       {stride, /*padding=*/{0, 0}, dilation, /*groups=*/1});
  shape.destinations = static_cast<int>(weights.size());
  std::vector<Tensor> keep;
  std::vector<const void*> weight_data;
  std::vector<const float*> bias_data;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    check_4d(op, "weight", w);
    check_like(op, "the first weight", first, "weight", w, /*same_shape=*/false);
    FUSED_CNN_CHECK(w.size(1) == first.size(1) && w.size(2) == first.size(2) && w.size(3) == first.size(3), op,
                    ": weights that share an input must have equal in-channels and kernels, got ", shape_of(w));
    shape.out_channels[i] = w.size(0);
    keep.push_back(dense(w, MemoryFormat::Contiguous));
    weight_data.push_back(keep.back().data_ptr());
    bias_data.push_back(nullptr);
    if (!biases[i]) continue;
    check_channels(op, "bias", *biases[i], w.size(0));
    keep.push_back(torch::stable::contiguous(torch::stable::to(*biases[i], ScalarType::Float)));
    bias_data.back() = static_cast<const float*>(keep.back().data_ptr());
  }
  const Tensor packed = empty_vector(first, engine::packed_weight_bytes(shape, dtype), ScalarType::Byte);
  engine::pack_weight(shape, dtype, weight_data.data(), bias_data.data(), packed.data_ptr());
  return packed;
}

void check_packed(const char* op, const Tensor& packed, const engine::ConvShape& shape, DType dtype) {
  const int64_t expected = engine::packed_weight_bytes(shape, dtype);
  FUSED_CNN_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_cpu() &&
                      packed.is_contiguous() && packed.size(0) == expected &&
                      reinterpret_cast<uintptr_t>(packed.data_ptr()) % 64 == 0,
                  op, ": packed must be the ", expected,
                  " bytes that packing makes of this weight shape, stride and dilation, got ", shape_of(packed));
}

Tensor cpu_conv_packed(const char* op, const Tensor& x, const Tensor& packed, const Ints& weight_shape,
                       const std::optional<Tensor>& residual, const ConvParams& params, bool relu) {
  check_4d(op, "x", x);
  const DType dtype = engine_dtype(op, x);
  FUSED_CNN_CHECK(weight_shape.size() == 4 && weight_shape[1] == x.size(1) && weight_shape[0] >= 1, op,
                  ": x has shape ", shape_of(x), ", which does not fit the weight's input channels");
  const Ints kernel{weight_shape[2], weight_shape[3]};
  check_geometry(op, x.size(2), x.size(3), kernel, params);
  const int64_t channels = weight_shape[0];
  const engine::ConvShape shape = conv_shape(sizes_of(x), channels, kernel, params);
  if (residual) check_result_shape(op, "residual", *residual, x, channels, shape.out.h, shape.out.w);
  check_packed(op, packed, shape, dtype);
  const Tensor out = empty_result(x, channels, shape.out.h, shape.out.w);
  if (out.numel() > 0) {
    const RowView in = rows_of(x);
    std::optional<RowView> addend;
    if (residual) addend = rows_of(*residual);
    const engine::Destination to{
        .out = {out.data_ptr(), channels}, .residual = addend ? rows_at(*addend) : Rows{}, .relu = relu};
    engine::conv_forward(shape, dtype, {.x = rows_at(in), .packed = packed.data_ptr(), .destination = {to}});
  }
  return dense(out, result_format(x));
}

Tensor cpu_conv_forward(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& residual, const ConvParams& params, bool relu) {
  check_conv(op, x, weight, bias, residual, params);
  const MemoryFormat format = result_format(x);
  const Tensor out = dense(aten_convolution(x, weight, bias, params), format);
  std::optional<Tensor> addend;
  if (residual) addend = dense(*residual, format);
  if (relu || residual) residual_relu(dtype_of(op, "x", x), out, addend, relu, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_conv_backward(const char* op, const Tensor& grad_out,
                                                             const std::optional<Tensor>& out, const Tensor& x,
                                                             const Tensor& weight, const ConvParams& params,
                                                             bool needs_x, bool needs_weight, bool needs_bias) {
  check_conv(op, x, weight, std::nullopt, grad_out, params);
  if (out) check_like(op, "grad_out", grad_out, "out", *out);
  // Column sums want channels adjacent; the masked gradient goes on to oneDNN, which reads either layout.
  RowView grad = rows_of(grad_out);
  DreluBgrad branch{.grad_out = rows_at(grad), .channels = grad_out.size(1)};
  std::optional<RowView> result;
  std::optional<RowResult> masked;
  if (out) {
    result = rows_of(*out);
    masked.emplace(grad_out, grad_out.size(1), result_format(*out));
    branch.out = rows_at(*result);
    branch.grad = rows_at(*masked);
  }
  std::vector<double> sums;
  if (out || needs_bias)
    sums = masked_gradient(dtype_of(op, "grad_out", grad_out), {branch}, row_count(grad_out), needs_bias);
  Tensor grad_x = nothing(grad_out), grad_weight = nothing(grad_out);
  if (needs_x || needs_weight) {
    const Tensor& of_convolution = masked ? masked->tensor : grad.tensor;
    auto [of_x, of_weight] = aten_convolution_backward(of_convolution, x, weight, params, needs_x, needs_weight);
    if (needs_x) grad_x = dense(of_x, result_format(x));
    if (needs_weight) grad_weight = dense(of_weight, result_format(weight));
  }
  return {grad_x, grad_weight, vector_of(sums, grad_out, grad_out.scalar_type()),
          masked ? masked->finish() : nothing(grad_out)};
}

}  // namespace fused_cnn
