// The convolution rooms' CPU work: forward on the engine, or on the library with the epilogue in one pass behind it;
// backward the epilogue's gradient (mask and column sums in one pass) before the library's convolution gradients.
#include "cpu/conv.h"
#include <algorithm>
#include <cstdlib>
#include "cpu/cpu_kernels.h"
#include "cpu/parallel.h"

namespace fused_cnn {
namespace {

Tensor as_float_vector(const Tensor& like, const std::vector<double>& values) {
  const int64_t sizes[] = {static_cast<int64_t>(values.size())};
  Tensor wide = torch::stable::empty(sizes, ScalarType::Double, torch::headeronly::Layout::Strided, like.device());
  double* to = static_cast<double*>(wide.data_ptr());
  for (size_t i = 0; i < values.size(); ++i) to[i] = values[i];
  return torch::stable::to(wide, like.scalar_type());
}

Tensor library_conv_forward(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& residual, const ConvParams& params, bool relu) {
  const DType dtype = dtype_of(op, "x", x);
  const MemoryFormat format = result_format(x);
  Tensor out = dense(aten_convolution(x, weight, bias, params), format);
  if (!relu && !residual) return out;
  const Tensor addend = residual ? dense(*residual, format) : out;
  const void* from = residual ? addend.data_ptr() : nullptr;
  void* to = out.data_ptr();
  const int64_t size = out.element_size();
  const auto loop = FUSED_CNN_PICK(epilogue);
  parallel_elements(out.numel(), [&](int64_t begin, int64_t end) {
    loop(dtype, at(to, begin, size), from == nullptr ? nullptr : at(from, begin, size), end - begin, relu);
  });
  return out;
}

constexpr int64_t kCacheBytes = 4 << 20;  // a thread's share of the caches, for what a block computes in between

bool has_pitch(const Tensor& t) {
  const int64_t pitch = t.stride(3);
  return t.stride(1) == 1 && pitch >= t.size(1) && t.stride(2) == pitch * t.size(3) &&
         t.stride(0) == pitch * t.size(3) * t.size(2);
}

}  // namespace

Pixels::Pixels(const Tensor& t)
    : tensor(has_pitch(t) ? t : dense(t, MemoryFormat::ChannelsLast)), pitch(has_pitch(t) ? t.stride(3) : t.size(1)) {}

bool engine_takes(const Tensor& x, int64_t groups) {
  return groups == 1 && (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16);
}

engine::DType engine_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::BFloat16 ? engine::DType::bf16 : engine::DType::f32;
}

engine::ThreadPool engine_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t count, int64_t grain, void (*fn)(int64_t, int64_t, void*), void* context) {
            torch::stable::parallel_for(0, count, grain, [=](int64_t b, int64_t e) { fn(b, e, context); });
          }};
}

namespace {

constexpr size_t kAlignment = 4096;

using Memory = std::unique_ptr<void, void (*)(void*)>;

Memory allocate(int64_t bytes) {
  Memory memory(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment), std::free);
  FUSED_CNN_CHECK(memory != nullptr, "out of memory: ", bytes, " bytes for what lies between a block's convolutions");
  return memory;
}

int64_t budget() {
  return torch::stable::get_num_threads() * kCacheBytes;
}

}  // namespace

int64_t images_at_once(int64_t images, int64_t bytes_between) {
  return std::clamp<int64_t>(budget() / std::max<int64_t>(1, bytes_between), 1, std::max<int64_t>(1, images));
}

Between::Between(int64_t bytes) : own_(nullptr, std::free), data_(nullptr) {
  if (bytes > budget()) {  // one large image
    own_ = allocate(bytes);
    data_ = own_.get();
    return;
  }
  thread_local Memory kept(nullptr, std::free);
  thread_local int64_t kept_bytes = 0;
  if (bytes > kept_bytes) {
    kept_bytes = 0;
    kept = allocate(bytes);
    kept_bytes = bytes;
  }
  data_ = kept.get();
}

engine::ConvShape engine_shape(int64_t images, int64_t channels, int64_t height, int64_t width, int64_t out_channels,
                               const Ints& kernel, const ConvParams& p) {
  engine::ConvShape s{};
  s.N = s.batch = images, s.C = channels, s.H = height, s.W = width;
  s.kernel_h = kernel[0], s.kernel_w = kernel[1];
  s.stride_h = p.stride[0], s.stride_w = p.stride[1];
  s.pad_h = p.padding[0], s.pad_w = p.padding[1];
  s.dilation_h = p.dilation[0], s.dilation_w = p.dilation[1];
  s.destinations = 1;
  s.out_channels[0] = out_channels;
  return s;
}

Tensor engine_pack(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                   const Ints& stride, const Ints& dilation) {
  const char* op = "conv_pack";
  FUSED_CNN_CHECK(!weights.empty() && weights.size() <= engine::kMaxDestinations && weights.size() == biases.size(), op,
                  ": between 1 and ", engine::kMaxDestinations, " weights with as many biases, got ", weights.size());
  for (const Ints& steps : {stride, dilation})
    FUSED_CNN_CHECK(steps.size() == 2 && steps[0] >= 1 && steps[1] >= 1, op,
                    ": stride and dilation must be two values of at least 1 each");
  engine::ConvShape shape{};
  std::vector<Tensor> keep;
  std::vector<const void*> weight_data;
  std::vector<const float*> bias_data;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    check_4d(op, "weight", w);
    check_like(op, "the first weight", weights[0], "weight", w, /*same_shape=*/false);
    FUSED_CNN_CHECK(engine_takes(w, 1), op, ": weight must be float32 or bfloat16");
    FUSED_CNN_CHECK(
        w.size(1) == weights[0].size(1) && w.size(2) == weights[0].size(2) && w.size(3) == weights[0].size(3), op,
        ": weights that share an input must have equal in-channels and kernels, got ", shape_of(w));
    shape.out_channels[i] = w.size(0);
    keep.push_back(dense(w, MemoryFormat::Contiguous));
    weight_data.push_back(keep.back().data_ptr());
    if (biases[i]) {
      check_channels(op, "bias", *biases[i], w.size(0));
      keep.push_back(torch::stable::to(*biases[i], ScalarType::Float));
      keep.back() = torch::stable::contiguous(keep.back());
      bias_data.push_back(static_cast<const float*>(keep.back().data_ptr()));
    } else {
      bias_data.push_back(nullptr);
    }
  }
  shape.destinations = static_cast<int>(weights.size());
  shape.C = weights[0].size(1), shape.kernel_h = weights[0].size(2), shape.kernel_w = weights[0].size(3);
  shape.stride_h = stride[0], shape.stride_w = stride[1];
  shape.dilation_h = dilation[0], shape.dilation_w = dilation[1];
  const engine::DType dtype = engine_dtype(weights[0]);
  const int64_t sizes[] = {engine::packed_weight_bytes(shape, dtype)};
  Tensor packed =
      torch::stable::empty(sizes, ScalarType::Byte, torch::headeronly::Layout::Strided, weights[0].device());
  engine::pack_weight(shape, dtype, weight_data.data(), bias_data.data(), packed.data_ptr());
  return packed;
}

void check_packed(const char* op, const Tensor& packed, const engine::ConvShape& shape, engine::DType dtype) {
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
  FUSED_CNN_CHECK(engine_takes(x, params.groups), op, ": x must be float32 or bfloat16 and groups 1");
  FUSED_CNN_CHECK(weight_shape.size() == 4 && weight_shape[1] == x.size(1) && weight_shape[0] >= 1, op,
                  ": x has shape ", shape_of(x), ", which does not fit the weight's input channels");
  const Ints kernel{weight_shape[2], weight_shape[3]};
  check_geometry(op, x.size(2), x.size(3), kernel, params);
  const engine::ConvShape shape =
      engine_shape(x.size(0), x.size(1), x.size(2), x.size(3), weight_shape[0], kernel, params);
  const int64_t height = engine::conv_out_h(shape), width = engine::conv_out_w(shape);
  if (residual) check_residual(op, x, *residual, weight_shape[0], height, width);
  check_packed(op, packed, shape, engine_dtype(x));
  Tensor out = empty_result(x, weight_shape[0], height, width);
  if (out.numel() > 0) {
    const Pixels in(x);
    std::optional<Pixels> addend;
    if (residual) addend.emplace(*residual);
    engine::ConvArgs args{in.data(), in.pitch, packed.data_ptr(), {}};
    args.destination[0] = {out.data_ptr(), weight_shape[0], addend ? addend->data() : nullptr,
                           addend ? addend->pitch : 0, relu};
    engine::conv_forward(shape, engine_dtype(x), args, engine_threads());
  }
  return dense(out, result_format(x));
}

Tensor cpu_conv_forward(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& residual, const ConvParams& params, bool relu) {
  check_conv(op, x, weight, bias, residual, params);
  return library_conv_forward(op, x, weight, bias, residual, params, relu);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_conv_backward(const char* op, const Tensor& grad_out,
                                                             const std::optional<Tensor>& out, const Tensor& x,
                                                             const Tensor& weight, const ConvParams& params,
                                                             bool needs_x, bool needs_weight, bool needs_bias) {
  check_conv(op, x, weight, std::nullopt, grad_out, params);
  if (out) check_like(op, "grad_out", grad_out, "out", *out);
  const DType dtype = dtype_of(op, "grad_out", grad_out);
  const int64_t channels = grad_out.size(1), rows = channels == 0 ? 0 : grad_out.numel() / channels;
  // Column sums want channels adjacent; the masked gradient goes on to the library, which takes either layout.
  const Tensor dense_grad = dense(grad_out, MemoryFormat::ChannelsLast);
  Tensor grad = dense_grad;
  std::vector<double> sums(channels, 0.0);
  if ((out || needs_bias) && rows > 0) {
    if (out) grad = empty_like_4d(grad_out, MemoryFormat::ChannelsLast);
    const Tensor dense_out = out ? dense(*out, MemoryFormat::ChannelsLast) : grad;
    const void* po = out ? dense_out.data_ptr() : nullptr;
    const void* pg = dense_grad.data_ptr();
    void* to = out ? grad.data_ptr() : nullptr;
    const auto loop = FUSED_CNN_PICK(mask_and_sum);
    // As many parts as the tensor's size gives, whatever the number of threads, and added in order: the same sums every
    // time.
    const int64_t parts = std::clamp<int64_t>(rows * channels / kGrain, 1, 64);
    std::vector<double> partial(parts * channels, 0.0);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        loop(dtype, pg, po, to, &partial[p * channels], rows * p / parts, rows * (p + 1) / parts, channels);
      }
    });
    for (int64_t p = 0; p < parts; ++p) {
      for (int64_t c = 0; c < channels; ++c) sums[c] += partial[p * channels + c];
    }
  }
  Tensor grad_x = nothing(grad_out), grad_weight = nothing(grad_out);
  if (needs_x || needs_weight) {
    auto [gx, gw] = aten_convolution_backward(grad, x, weight, params, needs_x, needs_weight);
    if (needs_x) grad_x = dense(gx, result_format(x));
    if (needs_weight) grad_weight = dense(gw, result_format(weight));
  }
  return {grad_x, grad_weight, needs_bias ? as_float_vector(grad_out, sums) : nothing(grad_out),
          out ? dense(grad, result_format(*out)) : nothing(grad_out)};
}

}  // namespace fused_cnn
