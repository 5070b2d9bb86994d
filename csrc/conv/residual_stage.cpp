// fused_cnn::residual_stage_packed_fwd on the CPU (residual_stage.h).
// A few images go through all the blocks before the next ones: what lies between the convolutions then stays in cache,
// and memory sees x and the result alone. A projection is written where the result goes, and added there; a block that
// ends in a 1x1 convolution adds to its input where it lies.
#include "conv/residual_stage.h"
#include "cpu/conv.h"
#include "cpu/parallel.h"

namespace fused_cnn {
namespace {

constexpr int64_t kCacheBytes = 4 << 20;  // a thread's share of the caches, for what lies between the convolutions

struct Convolution {
  engine::ConvShape shape;
  const void* packed;
};

Tensor residual_stage_packed_fwd(const Tensor& x, std::vector<Tensor> packed, Ints geometry, Ints lengths,
                                 bool shortcut, bool projects) {
  const char* op = "residual_stage_packed_fwd";
  const DType dtype = engine_dtype(op, x);
  const ResidualStage stage = checked_stage(op, x, packed.size(), geometry, lengths, shortcut, projects);
  const auto packed_of = [&](const StageConvolution& c, const Tensor& weight) {
    const engine::ConvShape shape = conv_shape({0, c.in[0], c.in[1], c.in[2]}, c.out[0], c.kernel, c.params);
    check_packed(op, weight, shape, dtype);
    return Convolution{shape, weight.data_ptr()};
  };
  std::vector<Convolution> chain;
  for (const StageConvolution& c : stage.chain) chain.push_back(packed_of(c, packed[chain.size()]));
  std::optional<Convolution> projection;
  if (projects) projection = packed_of(*stage.projection, packed.back());
  int64_t between[2] = {0, 0};  // elements of an image, in turn
  size_t first = 0;
  for (const int64_t length : lengths) {
    for (int64_t i = 0; i + 1 < length; ++i) {
      const ImageSize& out = stage.chain[first + i].out;
      between[i % 2] = std::max(between[i % 2], out[0] * out[1] * out[2]);
    }
    first += length;
  }

  const ImageSize& size = stage.chain.back().out;
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
