// fused_cnn::residual_stage_packed_fwd on the CPU: residual blocks one after the other in eval form, BatchNorm folded.
//   block(x) = relu(conv_n(... relu(conv_1(x))) + shortcut(x)),   shortcut of the first block: nothing, x, or a
//   convolution of x; of the later ones: their input
// A few images go through all the blocks before the next ones: what lies between the convolutions then stays in cache,
// and memory sees x and the result alone. A projection is written where the result goes, and added there; a block that
// ends in a 1x1 convolution adds to its input where it lies.
#include "cpu/conv.h"
#include "cpu/parallel.h"

namespace fused_cnn {
namespace {

constexpr int64_t kGeometry = 10;         // in and out channels; kernel, stride, padding and dilation, (h, w) each
constexpr int64_t kCacheBytes = 4 << 20;  // a thread's share of the caches, for what lies between the convolutions

struct Convolution {
  engine::ConvShape shape;
  const void* packed;
};

Tensor residual_stage_packed_fwd(const Tensor& x, std::vector<Tensor> packed, Ints geometry, Ints lengths,
                                 bool shortcut, bool projects) {
  const char* op = "residual_stage_packed_fwd";
  check_4d(op, "x", x);
  const DType dtype = engine_dtype(op, x);
  FUSED_CNN_CHECK(geometry.size() == kGeometry * packed.size(), op, ": ", kGeometry,
                  " values of geometry per packed weight are wanted, got ", geometry.size(), " for ", packed.size());
  int64_t convolutions = projects;
  for (const int64_t length : lengths) {
    FUSED_CNN_CHECK(length >= 1, op, ": a block must have at least 1 convolution, got ", length);
    convolutions += length;
  }
  FUSED_CNN_CHECK(!lengths.empty() && convolutions == int64_t(packed.size()), op, ": blocks of ", convolutions,
                  " convolutions in all, the projection among them, need as many packed weights, got ", packed.size());
  std::vector<Convolution> chain;
  Ints size{x.size(1), x.size(2), x.size(3)};  // of what the next convolution reads
  const auto next_of_size = [&](size_t index) {
    const int64_t* g = &geometry[index * kGeometry];
    FUSED_CNN_CHECK(g[0] == size[0], op, ": a convolution of ", g[0], " channels meets an input of ", size[0]);
    FUSED_CNN_CHECK(g[1] >= 1, op, ": a convolution must have at least 1 channel, got ", g[1]);
    const Ints kernel{g[2], g[3]};
    const ConvParams params{.stride = {g[4], g[5]}, .padding = {g[6], g[7]}, .dilation = {g[8], g[9]}, .groups = 1};
    check_geometry(op, size[1], size[2], kernel, params);
    const engine::ConvShape shape = conv_shape({0, size[0], size[1], size[2]}, g[1], kernel, params);
    check_packed(op, packed[index], shape, dtype);
    FUSED_CNN_CHECK(addressable({g[1], shape.out.h, shape.out.w}), op, ": an image of ", g[1], " channels and ",
                    shape.out.h, " x ", shape.out.w, " pixels is too large");
    return Convolution{shape, packed[index].data_ptr()};
  };
  const auto size_of = [](const Convolution& c) { return Ints{c.shape.out_channels[0], c.shape.out.h, c.shape.out.w}; };
  std::optional<Convolution> projection;
  if (projects) projection = next_of_size(packed.size() - 1);
  int64_t between[2] = {0, 0};  // elements of an image, in turn
  for (size_t b = 0; b < lengths.size(); ++b) {
    const Ints added = b == 0 && projects ? size_of(*projection) : size;
    for (int64_t i = 0; i < lengths[b]; ++i) {
      chain.push_back(next_of_size(chain.size()));
      size = size_of(chain.back());
      if (i + 1 < lengths[b]) between[i % 2] = std::max(between[i % 2], size[0] * size[1] * size[2]);
    }
    FUSED_CNN_CHECK(!(b > 0 || shortcut || projects) || added == size, op, ": the shortcut gives (", added[0], ", ",
                    added[1], ", ", added[2], "), but the convolutions give (", size[0], ", ", size[1], ", ", size[2],
                    ")");
  }

  const int64_t channels = size[0];
  const Tensor out = empty_result(x, channels, size[1], size[2]);
  if (out.numel() == 0) return dense(out, result_format(x));
  // Every block's result has the shape of the last one's. Backwards from there, each goes where the next one reads it:
  // the same place, where that adds in place, or the other one.
  std::vector<bool> in_scratch(lengths.size());
  bool second = false;  // whether any goes to the other one
  size_t end = chain.size();
  for (size_t b = lengths.size() - 1; b > 0; --b) {
    const engine::ConvShape& last = chain[end - 1].shape;
    const bool in_place = lengths[b] > 1 && last.kernel.h * last.kernel.w == 1;
    in_scratch[b - 1] = in_scratch[b] == in_place;
    second |= in_scratch[b - 1];
    end -= lengths[b];
  }

  const RowView in = rows_of(x);
  const int64_t batch = x.size(0), element = x.element_size(), image = channels * size[1] * size[2] * element;
  // As many images at once as leave what lies between their convolutions in the threads' caches.
  const int64_t budget = torch::stable::get_num_threads() * kCacheBytes;
  const int64_t image_between = (between[0] + between[1]) * element + second * image;
  const int64_t images = std::clamp<int64_t>(budget / std::max<int64_t>(1, image_between), 1, batch);
  const auto rounded = [&](int64_t bytes) { return (images * bytes + 63) / 64 * 64; };
  const int64_t bytes[] = {rounded(between[0] * element), rounded(between[1] * element), second ? rounded(image) : 0};
  // Kept for the calling thread's next stage, where it is in cache and mapped, unless one large image needs more.
  thread_local Workspace kept;
  Workspace own;
  const int64_t wanted = bytes[0] + bytes[1] + bytes[2];
  char* const memory = static_cast<char*>((wanted > budget ? own : kept).at_least(wanted));
  char* const scratch[] = {memory, memory + bytes[0], memory + bytes[0] + bytes[1]};
  for (int64_t n = 0; n < batch; n += images) {
    const auto run = [&](const Convolution& c, Rows from, const engine::Destination& to) {
      engine::ConvShape shape = c.shape;
      shape.N = std::min(images, batch - n);
      shape.batch = batch;
      engine::conv_forward(shape, dtype, {.x = from, .packed = c.packed, .destination = {to}});
    };
    Rows input{at(in.data, n * x.size(2) * x.size(3) * in.pitch, element), in.pitch};
    const Convolution* next = chain.data();
    for (size_t b = 0; b < lengths.size(); ++b) {
      const Rows result{in_scratch[b] ? scratch[2] : static_cast<char*>(out.data_ptr()) + n * image, channels};
      Rows from = input;
      for (int64_t i = 0; i + 1 < lengths[b]; ++i) {
        const Rows to{scratch[i % 2], next->shape.out_channels[0]};
        run(*next++, from, {.out = to});
        from = to;
      }
      const bool projected = b == 0 && projects;
      if (projected) run(*projection, input, {.out = result, .relu = false});
      const Rows added = projected ? result : b > 0 || shortcut ? input : Rows{};
      run(*next++, from, {.out = result, .residual = added});
      input = result;
    }
  }
  return dense(out, result_format(x));
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("residual_stage_packed_fwd", FUSED_CNN_BOX(&fused_cnn::residual_stage_packed_fwd));
}
