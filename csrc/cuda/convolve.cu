// See convolve.h.
#include "cuda/convolve.h"
#include "cuda/gemm/space_to_depth.cuh"
#include "cuda/stem.h"

namespace fused_cnn {
namespace {

// At any stride; Problem::is_product() asks for stride 1.
bool is_pointwise(const Tensor& weight, const ConvParams& params) {
  return weight.size(2) == 1 && weight.size(3) == 1 && params.groups == 1 && params.padding == kNoPadding;
}

// The pixels that a strided 1x1 convolution reads, as a view.
Tensor strided_slice(const Tensor& x, const Pair& stride) {
  const std::optional<int64_t> whole;
  Tensor view = x;
  for (int64_t axis = 0; axis < 2; ++axis) {
    if (stride[axis] == 1) continue;
    const auto found = call_operator("aten::slice", "Tensor", view, axis + 2, whole, whole, stride[axis]);
    view = torch::stable::detail::to<Tensor>(found[0]);
  }
  return view;
}

// Whether tensor cores may run it; for other than 1x1 windows what TMA's im2col mode takes: offsets of the window's
// taps and its corners within a byte, strides up to 8.
bool convolution_supports(DType dtype, const Tensor& x, const Tensor& weight, const ConvParams& p) {
  const int vector = in_16_bytes(dtype);
  if (!tensor_cores_take(dtype) || p.groups != 1 || weight.size(0) % vector || x.size(1) == 0 || x.numel() > INT_MAX ||
      p.stride[0] != p.stride[1] || p.stride[0] > 8 || (x.size(1) % vector && p.dilation != Pair{1, 1})) {
    return false;
  }
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t reach = p.dilation[axis] * (weight.size(axis + 2) - 1);
    if (reach > 127 || p.padding[axis] > reach) return false;
  }
  return true;
}

// Whether cuDNN's fused call may be made: PyTorch takes neither its switch for cuDNN nor the one for deterministic
// algorithms into account there.
bool library_may_fuse() {
  if (!fused_cnn_context || !fused_cnn_cudnn_enabled || !fused_cnn_cudnn_deterministic || !fused_cnn_deterministic) {
    return false;
  }
  const void* context = fused_cnn_context();
  return fused_cnn_cudnn_enabled(context) && !fused_cnn_cudnn_deterministic(context) &&
         !fused_cnn_deterministic(context);
}

std::array<int, 2> int_pair(int64_t a, int64_t b) {
  return {static_cast<int>(a), static_cast<int>(b)};
}

// `conv` with the sizes of a convolution over x itself.
Convolution with_sizes(Convolution conv, const Tensor& x, const Tensor& weight, const ConvParams& params) {
  conv.images = static_cast<int>(x.size(0));
  conv.inputs = static_cast<int>(x.size(1));
  conv.outputs = static_cast<int>(weight.size(0));
  conv.size = int_pair(x.size(2), x.size(3));
  conv.kernel = int_pair(weight.size(2), weight.size(3));
  conv.stride = int_pair(params.stride[0], params.stride[1]);
  conv.padding = int_pair(params.padding[0], params.padding[1]);
  conv.dilation = int_pair(params.dilation[0], params.dilation[1]);
  return conv;
}

// `conv` over x itself.
void run_convolution(const GemmKernels& kernels, const Tensor& x, const Tensor& weight, Convolution conv) {
  const RowView in = on_16_bytes(rows_of(x));
  const Tensor filter = on_16_bytes(dense(weight, MemoryFormat::ChannelsLast));
  conv.x = in.data;
  conv.pixel = in.pitch;
  conv.row = in.pitch * x.size(3);
  conv.image = conv.row * x.size(2);
  conv.weight = filter.data_ptr();
  kernels.run(Launch(x), conv);
}

// `conv` over x with each 2 x 2 pixels as the channels of one.
void run_space_to_depth(const GemmKernels& kernels, const Tensor& x, const Tensor& weight, const ConvParams& params,
                        const std::array<int64_t, 2>& size, Convolution conv) {
  const int64_t taps_h = ceil_div<int64_t>(weight.size(2), 2), taps_w = ceil_div<int64_t>(weight.size(3), 2);
  const int64_t height = size[0] + taps_h - 1, width = size[1] + taps_w - 1;
  const Tensor deep = empty_result(x, kDepth, height, width);
  const Tensor dense_weight = dense(weight, MemoryFormat::Contiguous);
  const Tensor filter = empty_vector(weight, weight.size(0) * taps_h * taps_w * kDepth, weight.scalar_type());
  StemShape shape{.inputs = static_cast<int>(x.size(1)),
                  .height = static_cast<int>(x.size(2)),
                  .width = static_cast<int>(x.size(3)),
                  .padding = {static_cast<int>(params.padding[0]), static_cast<int>(params.padding[1])},
                  .depth_height = static_cast<int>(height),
                  .depth_width = static_cast<int>(width)};
  for (int i = 0; i < 4; ++i) shape.stride[i] = x.stride(i);
  const Launch launch(x);
  const auto prepare = [&](auto element) {
    using T = decltype(element);
    const auto blocks = [](int64_t threads) { return ceil_div<int64_t>(threads, kDepthThreads); };
    launch.run("space_to_depth_kernel", space_to_depth_kernel<T>, blocks(row_count(deep)), 1, kDepthThreads,
               data_of<const T>(x), data_of<T>(deep), shape, row_count(deep));
    launch.run("stem_weight_kernel", stem_weight_kernel<T>, blocks(filter.numel()), 1, kDepthThreads,
               data_of<const T>(dense_weight), data_of<T>(filter), shape.inputs, static_cast<int>(weight.size(2)),
               static_cast<int>(weight.size(3)), static_cast<int>(taps_h), static_cast<int>(taps_w), filter.numel());
  };
  conv.dtype == DType::f16 ? prepare(f16_t{}) : prepare(bf16_t{});
  conv.x = deep.data_ptr();
  conv.pixel = kDepth;
  conv.row = kDepth * width;
  conv.image = conv.row * height;
  conv.weight = filter.data_ptr();
  conv.inputs = static_cast<int>(kDepth * taps_w);
  conv.size = int_pair(height, size[1]);
  conv.kernel = int_pair(taps_h, 1);
  conv.stride = conv.dilation = {1, 1};
  conv.padding = {0, 0};
  kernels.run(launch, conv);
}

// The library's own convolution with bias and ReLU; nothing where it has none that fits.
std::optional<Tensor> library_fused(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                    const ConvParams& params) {
  const Tensor rows = rows_of(aligned_for_cudnn(x)).tensor;
  if (bias) bias = aligned_for_cudnn(*bias);
  try {
    const auto found =
        call_operator("aten::cudnn_convolution_relu", "", rows, aligned_for_cudnn(weight), bias, list_of(params.stride),
                      list_of(params.padding), list_of(params.dilation), params.groups);
    return torch::stable::detail::to<Tensor>(found[0]);
  } catch (const std::runtime_error&) {
    return std::nullopt;
  }
}

}  // namespace

const Tile* tile_of(const Tensor& x, const Tensor& weight, const ConvParams& params, bool residual, bool relu,
                    const std::array<int64_t, 2>& size, bool own, bool pooled) {
  const DType dtype = dtype_of("convolve", "x", x);
  const int64_t rows = x.size(0) * size[0] * size[1];
  if (!convolution_supports(dtype, x, weight, params) || rows > kMostRows) return nullptr;
  const GemmKernels kernels(x.get_device_index());
  if (!kernels) return nullptr;
  const Problem problem{.device = kernels.device,
                        .dtype = static_cast<int64_t>(dtype),
                        .m = rows,
                        .n = weight.size(0),
                        .k = weight.size(1) * weight.size(2) * weight.size(3),
                        .residual = residual,
                        .slices = 1,
                        .kernel_height = weight.size(2),
                        .kernel_width = weight.size(3),
                        .stride = params.stride[0],
                        .library_takes_all = !pooled && own && relu && !residual &&
                                             x.size(1) % in_16_bytes(dtype) == 0 && rows * weight.size(0) <= INT_MAX &&
                                             library_may_fuse(),
                        .scope = pooled ? kPoolBehind : kConvolution};
  return &kernels.tile_for(problem);
}

void convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const RowView& residual,
              const ConvParams& params, bool relu, const std::array<int64_t, 2>& size, const GemmSlice& out,
              const Tile* tile) {
  if (x.size(0) * size[0] * size[1] == 0 || weight.size(0) == 0) return;
  const bool as_convolution = tile && !tile->is_library() && tile->kind != TileKind::product;
  if (as_convolution && aligned16(out.rows, x.element_size())) {
    if (tile->kind == TileKind::stem) {
      return run_stem(x, weight, bias, params.padding, relu, size, std::nullopt, out.rows);
    }
    const GemmKernels kernels(x.get_device_index());
    const RowView addend = residual.data ? on_16_bytes(residual) : residual;
    const Tensor vector = bias ? on_16_bytes(*bias) : Tensor();
    Convolution conv{
        .tile = tile,
        .dtype = dtype_of("convolve", "x", x),
        .epilogue = {.bias = bias ? vector.data_ptr() : nullptr, .residual = addend, .relu = relu, .slices = 1}};
    conv.epilogue.slice[0] = out;
    conv = with_sizes(conv, x, weight, params);
    return tile->kind == TileKind::space_to_depth ? run_space_to_depth(kernels, x, weight, params, size, conv)
                                                  : run_convolution(kernels, x, weight, conv);
  }
  if (is_pointwise(weight, params)) {
    if (params.stride != Pair{1, 1}) {
      const Tensor read = strided_slice(x, params.stride);
      const ConvParams unit = same_padding(1);
      const Tile* found = tile_of(read, weight, unit, residual.data != nullptr, relu, size, /*own=*/false);
      return convolve(read, weight, bias, residual, unit, relu, size, out, found);
    }
    std::vector<Tensor> biases;
    if (bias) biases.push_back(*bias);
    return pointwise(x, rows_of(x), {weight}, biases, residual, relu, {out}, tile);
  }
  finish_convolution(aten_convolution(x, weight, std::nullopt, params), bias, residual, relu, {out});
}

Tensor conv_bias_relu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                      const std::optional<Tensor>& residual, const ConvParams& params, bool relu, MemoryFormat format) {
  const std::array<int64_t, 2> size = size_of_result(x, weight, params);
  if (weight.size(0) == 0) return RowResult(x, 0, size[0], size[1], format).finish();
  if (bias) bias = dense_vector(*bias);
  const Tile* tile = tile_of(x, weight, params, residual.has_value(), relu, size, /*own=*/true);
  if (tile && tile->kind == TileKind::library_fused) {
    if (const std::optional<Tensor> out = library_fused(x, weight, bias, params)) return dense(*out, format);
  }
  const bool alone = !bias && !residual && !relu;
  if (alone && (!tile || tile->kind == TileKind::library)) {
    return dense(aten_convolution(x, weight, std::nullopt, params), format);
  }
  const RowResult out(x, weight.size(0), size[0], size[1], format);
  convolve(x, weight, bias, rows_of(residual), params, relu, size, {out, static_cast<int>(weight.size(0))}, tile);
  return out.finish();
}

}  // namespace fused_cnn
