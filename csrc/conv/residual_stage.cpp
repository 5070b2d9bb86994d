// fused_cnn::residual_stage_packed_fwd on the CPU: residual blocks one after the other in eval form, BatchNorm folded.
//   block(x) = relu(conv_n(... relu(conv_1(x))) + shortcut(x)),   shortcut of the first block: nothing, x, or a
//   convolution of x; of the later ones: their input
// A few images go through all the blocks before the next ones: what lies between the convolutions then stays in cache,
// and memory sees x and the result alone. A projection is written where the result goes, and added there; a block that
// ends in a 1x1 convolution adds to its input where it lies.
#include <algorithm>
#include "cpu/conv.h"

namespace fused_cnn {
namespace {

constexpr int64_t kGeometry = 10;  // in and out channels; kernel, stride, padding and dilation, (h, w) each

struct Convolution {
  Ints kernel;
  ConvParams params;
  int64_t in, out, in_h, in_w, height, width;
  const void* packed;
};

Convolution convolution(const char* op, const Tensor& packed, const int64_t* g, engine::DType dtype, int64_t in,
                        int64_t in_h, int64_t in_w) {
  FUSED_CNN_CHECK(g[0] == in, op, ": a convolution of ", g[0], " channels meets an input of ", in);
  const ConvParams params{{g[4], g[5]}, {g[6], g[7]}, {g[8], g[9]}, 1};
  Convolution c{{g[2], g[3]}, params, in, g[1], in_h, in_w, 0, 0, packed.data_ptr()};
  FUSED_CNN_CHECK(c.out >= 1, op, ": a convolution must have at least 1 channel, got ", c.out);
  check_geometry(op, in_h, in_w, c.kernel, c.params);
  const engine::ConvShape shape = engine_shape(0, in, in_h, in_w, c.out, c.kernel, c.params);
  check_packed(op, packed, shape, dtype);
  c.height = engine::conv_out_h(shape), c.width = engine::conv_out_w(shape);
  return c;
}

Tensor residual_stage_packed_fwd(const Tensor& x, std::vector<Tensor> packed, Ints geometry, Ints lengths,
                                 bool shortcut, bool projects) {
  const char* op = "residual_stage_packed_fwd";
  check_4d(op, "x", x);
  FUSED_CNN_CHECK(engine_takes(x, 1), op, ": x must be float32 or bfloat16");
  FUSED_CNN_CHECK(geometry.size() == kGeometry * packed.size(), op, ": ", kGeometry,
                  " values of geometry per packed weight are wanted, got ", geometry.size(), " for ", packed.size());
  int64_t convolutions = projects;
  for (const int64_t length : lengths) {
    FUSED_CNN_CHECK(length >= 1, op, ": a block must have at least 1 convolution, got ", length);
    convolutions += length;
  }
  FUSED_CNN_CHECK(!lengths.empty() && convolutions == int64_t(packed.size()), op, ": blocks of ", convolutions,
                  " convolutions in all, the projection among them, need as many packed weights, got ", packed.size());
  const engine::DType dtype = engine_dtype(x);
  std::vector<Convolution> chain;
  int64_t channels = x.size(1), height = x.size(2), width = x.size(3), between[2] = {0, 0};
  std::optional<Convolution> projection;
  if (projects) {
    const size_t last = packed.size() - 1;
    projection = convolution(op, packed[last], &geometry[last * kGeometry], dtype, channels, height, width);
  }
  for (size_t b = 0; b < lengths.size(); ++b) {
    const bool projected = b == 0 && projects;
    const int64_t added[] = {projected ? projection->out : channels, projected ? projection->height : height,
                             projected ? projection->width : width};
    for (int64_t i = 0; i < lengths[b]; ++i) {
      const size_t at = chain.size();
      chain.push_back(convolution(op, packed[at], &geometry[at * kGeometry], dtype, channels, height, width));
      channels = chain.back().out, height = chain.back().height, width = chain.back().width;
      if (i + 1 < lengths[b]) between[i % 2] = std::max(between[i % 2], channels * height * width);
    }
    FUSED_CNN_CHECK(
        !(b > 0 || shortcut || projects) || (added[0] == channels && added[1] == height && added[2] == width), op,
        ": the shortcut gives (", added[0], ", ", added[1], ", ", added[2], "), but the convolutions give (", channels,
        ", ", height, ", ", width, ")");
  }

  Tensor out = empty_result(x, channels, height, width);
  if (out.numel() == 0) return dense(out, result_format(x));
  // Every block's result has the shape of the last one's. Backwards from there, each goes where the next one reads it:
  // the same place, where that adds in place, or the other one.
  std::vector<bool> in_scratch(lengths.size());
  for (size_t b = lengths.size() - 1, next = chain.size(); b > 0; next -= lengths[b--]) {
    const Ints& kernel = chain[next - 1].kernel;
    const bool in_place = lengths[b] > 1 && kernel[0] * kernel[1] == 1;
    in_scratch[b - 1] = in_place ? in_scratch[b] : !in_scratch[b];
  }
  const bool second = std::find(in_scratch.begin(), in_scratch.end(), true) != in_scratch.end();

  const Pixels in(x);
  const int64_t size = x.element_size(), image = channels * height * width * size;
  const int64_t images = images_at_once(x.size(0), (between[0] + between[1]) * size + second * image);
  const auto rounded = [&](int64_t bytes) { return (images * bytes + 63) / 64 * 64; };
  const int64_t bytes[] = {rounded(between[0] * size), rounded(between[1] * size), second ? rounded(image) : 0};
  const Between memory(bytes[0] + bytes[1] + bytes[2]);
  char* const scratch[] = {static_cast<char*>(memory.data()), static_cast<char*>(memory.data()) + bytes[0],
                           static_cast<char*>(memory.data()) + bytes[0] + bytes[1]};
  const engine::ThreadPool threads = engine_threads();
  for (int64_t n = 0; n < x.size(0); n += images) {
    const int64_t count = std::min(images, x.size(0) - n);
    const auto run = [&](const Convolution& c, const void* from, int64_t pitch, const engine::Destination& to) {
      engine::ConvShape shape = engine_shape(count, c.in, c.in_h, c.in_w, c.out, c.kernel, c.params);
      shape.batch = x.size(0);
      engine::ConvArgs args{from, pitch, c.packed, {}};
      args.destination[0] = to;
      engine::conv_forward(shape, dtype, args, threads);
    };
    const void* input = static_cast<const char*>(in.data()) + n * x.size(2) * x.size(3) * in.pitch * size;
    int64_t input_pitch = in.pitch;
    char* const result = static_cast<char*>(out.data_ptr()) + n * image;
    const Convolution* next = chain.data();
    for (size_t b = 0; b < lengths.size(); ++b) {
      char* const to = in_scratch[b] ? scratch[2] : result;
      const void* from = input;
      int64_t pitch = input_pitch;
      for (int64_t i = 0; i + 1 < lengths[b]; ++i, ++next) {
        run(*next, from, pitch, {scratch[i % 2], next->out, nullptr, 0, true});
        from = scratch[i % 2], pitch = next->out;
      }
      const bool projected = b == 0 && projects;
      if (projected) run(*projection, input, input_pitch, {to, channels, nullptr, 0, false});
      const void* added = projected ? to : b > 0 || shortcut ? input : nullptr;
      run(*next++, from, pitch, {to, channels, added, projected ? channels : input_pitch, true});
      input = to, input_pitch = channels;
    }
  }
  return dense(out, result_format(x));
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("residual_stage_packed_fwd", FUSED_CNN_BOX(&fused_cnn::residual_stage_packed_fwd));
}
