// fused_cnn::residual_block_packed_fwd on the CPU: a whole residual block in eval form, BatchNorm folded.
//   out = relu(conv_n(... relu(conv_1(x))) + shortcut(x)),   shortcut: nothing, x, or a convolution of x
// A few images go through the whole block before the next: what lies between the convolutions then stays in cache, and
// memory sees x and the result alone. A projection is written where the result goes, and added there.
#include <algorithm>
#include "common/cpu_conv.h"

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

Tensor residual_block_packed_fwd(const Tensor& x, std::vector<Tensor> packed, Ints geometry, bool shortcut,
                                 bool projects) {
  const char* op = "residual_block_packed_fwd";
  check_4d(op, "x", x);
  FUSED_CNN_CHECK(engine_takes(x, 1), op, ": x must be float32 or bfloat16");
  FUSED_CNN_CHECK(packed.size() > size_t{projects} && geometry.size() == kGeometry * packed.size(), op, ": ", kGeometry,
                  " values of geometry per packed weight are wanted, got ", geometry.size(), " for ", packed.size());
  const engine::DType dtype = engine_dtype(x);
  std::vector<Convolution> chain;
  int64_t channels = x.size(1), height = x.size(2), width = x.size(3), between[2] = {0, 0};
  const size_t length = packed.size() - projects;
  for (size_t i = 0; i < length; ++i) {
    chain.push_back(convolution(op, packed[i], &geometry[i * kGeometry], dtype, channels, height, width));
    channels = chain.back().out, height = chain.back().height, width = chain.back().width;
    if (i + 1 < length) between[i % 2] = std::max(between[i % 2], channels * height * width);
  }
  std::optional<Convolution> projection;
  if (projects) {
    projection = convolution(op, packed[length], &geometry[length * kGeometry], dtype, x.size(1), x.size(2), x.size(3));
  }
  const int64_t of_shortcut[] = {projects ? projection->out : x.size(1), projects ? projection->height : x.size(2),
                                 projects ? projection->width : x.size(3)};
  FUSED_CNN_CHECK(
      !(shortcut || projects) || (of_shortcut[0] == channels && of_shortcut[1] == height && of_shortcut[2] == width),
      op, ": the shortcut gives (", of_shortcut[0], ", ", of_shortcut[1], ", ", of_shortcut[2],
      "), but the convolutions give (", channels, ", ", height, ", ", width, ")");

  Tensor out = empty_result(x, channels, height, width);
  if (out.numel() == 0) return dense(out, result_format(x));
  const Pixels in(x);
  const int64_t size = x.element_size(), images = images_at_once(x.size(0), (between[0] + between[1]) * size);
  const int64_t first_bytes = (images * between[0] * size + 63) / 64 * 64;
  const Between memory(first_bytes + images * between[1] * size);
  char* const scratch[] = {static_cast<char*>(memory.data()), static_cast<char*>(memory.data()) + first_bytes};
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
    const char* first = static_cast<const char*>(in.data()) + n * x.size(2) * x.size(3) * in.pitch * size;
    char* result = static_cast<char*>(out.data_ptr()) + n * height * width * channels * size;
    const void* from = first;
    int64_t pitch = in.pitch;
    for (size_t i = 0; i + 1 < length; ++i) {
      void* to = scratch[i % 2];
      run(chain[i], from, pitch, {to, chain[i].out, nullptr, 0, true});
      from = to, pitch = chain[i].out;
    }
    if (projects) run(*projection, first, in.pitch, {result, channels, nullptr, 0, false});
    const void* added = projects ? result : shortcut ? first : nullptr;
    run(chain.back(), from, pitch, {result, channels, added, projects ? channels : in.pitch, true});
  }
  return dense(out, result_format(x));
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("residual_block_packed_fwd", TORCH_BOX(&fused_cnn::residual_block_packed_fwd));
}
