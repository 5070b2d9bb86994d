// See conv.h.
#include "cpu/conv.h"
#include "shared/passes.h"

namespace fused_cnn {

bool engine_supports(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16;
}

DType engine_dtype(const char* op, const Tensor& x) {
  FUSED_CNN_CHECK(engine_supports(x), op, ": x must be float32 or bfloat16, got ",
                  torch::headeronly::toString(x.scalar_type()));
  return dtype_of(op, "x", x);
}

engine::Window window_of(const Ints& sizes, const Pair& kernel, const ConvParams& p) {
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

engine::ConvShape conv_shape(const Ints& sizes, int64_t out_channels, const Pair& kernel, const ConvParams& p) {
  engine::ConvShape shape{window_of(sizes, kernel, p)};
  shape.out_channels[0] = out_channels;
  shape.batch = shape.N;
  return shape;
}

// Of a weight that is, or is said to be, in memory.
static void check_weight_size(const char* op, const engine::ConvShape& shape) {
  for (int i = 0; i < shape.destinations; ++i) {
    const int64_t out = shape.out_channels[i];
    FUSED_CNN_CHECK(out >= 1 && addressable({out, shape.C, shape.kernel.h, shape.kernel.w}), op,
                    ": a weight must have at least one output channel and fit in memory, got shape (", out, ", ",
                    shape.C, ", ", shape.kernel.h, ", ", shape.kernel.w, ")");
  }
}

Tensor engine_pack(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                   const Pair& stride, const Pair& dilation) {
  const char* op = "conv_pack";
  FUSED_CNN_CHECK(!weights.empty() && weights.size() <= engine::kMaxDestinations && weights.size() == biases.size(), op,
                  ": between 1 and ", engine::kMaxDestinations, " weights with as many biases, got ", weights.size());
  for (const Pair& steps : {stride, dilation}) {
    FUSED_CNN_CHECK(std::min(steps[0], steps[1]) >= 1 && std::max(steps[0], steps[1]) <= kLargestStep, op,
                    ": stride and dilation must be at least 1 and less than 2^31 each");
  }
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
  check_weight_size(op, shape);
  const Tensor packed = empty_vector(first, engine::packed_weight_bytes(shape, dtype), ScalarType::Byte);
  engine::pack_weight(shape, dtype, weight_data.data(), bias_data.data(), packed.data_ptr());
  return packed;
}

void check_packed(const char* op, const Tensor& packed, const engine::ConvShape& shape, DType dtype) {
  check_weight_size(op, shape);
  const int64_t height = shape.H + 2 * shape.pad.h, width = shape.W + 2 * shape.pad.w;
  FUSED_CNN_CHECK(addressable({shape.C, height, width}), op, ": an image of ", shape.C, " channels and, padded, ",
                  height, " x ", width, " pixels is too large");
  const int64_t expected = engine::packed_weight_bytes(shape, dtype);
  FUSED_CNN_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_cpu() &&
                      packed.is_contiguous() && packed.size(0) == expected &&
                      reinterpret_cast<uintptr_t>(packed.data_ptr()) % 64 == 0,
                  op, ": packed must be the ", expected,
                  " bytes that packing makes of this weight shape, stride and dilation, got ", shape_of(packed));
}

Tensor cpu_conv_forward(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& residual, const ConvParams& params, bool relu) {
  check_conv(op, x, weight, bias, residual, params);
  const MemoryFormat format = result_format(x);
  const Tensor out = dense(aten_convolution(x, weight, bias, params), format);
  const Tensor added = residual ? dense(*residual, format) : Tensor();
  for_elements(relu || residual ? out.numel() : 0, [&](const auto& of, int64_t width, int64_t rows) {
    bias_residual_relu(out,
                       {{.y = of(out), .residual = residual ? of(added) : Rows{}, .out = of(out), .channels = width}},
                       relu, rows);
  });
  return out;
}

}  // namespace fused_cnn

// What a convolution of x (N, C, H, W) with a packed weight does in the form in which it runs: the bytes that it reads
// of the weight, which may be packed in two forms, and the floating-point operations of its products. kernel, stride,
// padding and dilation are (h, w) each.
FUSED_CNN_EXPORT void fused_cnn_conv_work(const int64_t x[4], int64_t out_channels, const int64_t kernel[2],
                                          const int64_t stride[2], const int64_t padding[2], const int64_t dilation[2],
                                          bool bfloat16, bool in_place, int64_t bytes_and_flops[2]) {
  using namespace fused_cnn;
  const auto pair = [](const int64_t* v) { return Pair{v[0], v[1]}; };
  const engine::ConvShape shape = conv_shape({x[0], x[1], x[2], x[3]}, out_channels, pair(kernel),
                                             {pair(stride), pair(padding), pair(dilation), /*groups=*/1});
  const engine::ConvWork work = engine::conv_work(shape, bfloat16 ? DType::bf16 : DType::f32, in_place);
  bytes_and_flops[0] = work.packed_bytes;
  bytes_and_flops[1] = 2 * work.multiply_adds;
}
