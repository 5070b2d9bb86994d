// fused_cnn::residual_stage_packed_fwd on the CPU (residual_stage.h, cpu_stage.h).
#include "conv/cpu_stage.h"
#include "cpu/parallel.h"

namespace fused_cnn {

EngineStage::EngineStage(const char* op, const Ints& sizes, DType dtype, const Tensor* packed, int64_t weights,
                         const Ints& geometry, const Ints& lengths, bool shortcut, bool projects)
    : dtype_(dtype), in_(sizes), lengths_(lengths), shortcut_(shortcut), element_(dtype == DType::f32 ? 4 : 2) {
  const ResidualStage stage =
      checked_stage(op, {sizes[1], sizes[2], sizes[3]}, weights, geometry, lengths, shortcut, projects);
  const auto packed_of = [&](const StageConvolution& c, int64_t index) {
    const engine::ConvShape shape = conv_shape({0, c.in[0], c.in[1], c.in[2]}, c.out[0], c.kernel, c.params);
    if (packed != nullptr) check_packed(op, packed[index], shape, dtype);
    return Convolution{shape, packed != nullptr ? packed[index].data_ptr() : nullptr};
  };
  for (const StageConvolution& c : stage.chain) chain_.push_back(packed_of(c, chain_.size()));
  if (projects) projection_ = packed_of(*stage.projection, weights - 1);
  int64_t between[2] = {0, 0};  // elements of an image, in turn
  size_t first = 0;
  for (const int64_t length : lengths) {
    for (int64_t i = 0; i + 1 < length; ++i) {
      const ImageSize& size = stage.chain[first + i].out;
      between[i % 2] = std::max(between[i % 2], size[0] * size[1] * size[2]);
    }
    first += length;
  }
  const ImageSize& size = stage.chain.back().out;
  out = {sizes[0], size[0], size[1], size[2]};
  image_ = size[0] * size[1] * size[2] * element_;
  // Every block's result has the shape of the last one's. Backwards from there, each goes where the next one reads it:
  // the same place, where that adds in place, or the other one.
  in_scratch_.resize(lengths.size());
  bool second = false;  // whether any goes to the other one
  size_t end = chain_.size();
  for (size_t b = lengths.size() - 1; b > 0; --b) {
    const engine::ConvShape& last = chain_[end - 1].shape;
    const bool in_place = lengths[b] > 1 && last.kernel.h * last.kernel.w == 1;
    in_scratch_[b - 1] = in_scratch_[b] == in_place;
    second |= in_scratch_[b - 1];
    end -= lengths[b];
  }
  // As many images at once as leave what lies between their convolutions in the threads' caches.
  const int64_t budget = torch::stable::get_num_threads() * kCacheBytes;
  const int64_t image_between = (between[0] + between[1]) * element_ + second * image_;
  images_ = std::clamp<int64_t>(budget / std::max<int64_t>(1, image_between), 1, std::max<int64_t>(1, sizes[0]));
  const auto rounded = [&](int64_t bytes) { return (images_ * bytes + 63) / 64 * 64; };
  for (int i = 0; i < 2; ++i) bytes_[i] = rounded(between[i] * element_);
  scratch_bytes = bytes_[0] + bytes_[1] + (second ? rounded(image_) : 0);
}

void EngineStage::run(Rows x, void* result_data, void* scratch_data) const {
  char* const memory = static_cast<char*>(scratch_data);
  char* const scratch[] = {memory, memory + bytes_[0], memory + bytes_[0] + bytes_[1]};
  const int64_t batch = in_[0];
  for (int64_t n = 0; n < batch; n += images_) {
    const auto convolve = [&](const Convolution& c, Rows from, const engine::Destination& to) {
      engine::ConvShape shape = c.shape;
      shape.N = std::min(images_, batch - n);
      shape.batch = batch;
      engine::conv_forward(shape, dtype_, {.x = from, .packed = c.packed, .destination = {to}});
    };
    Rows input{at(x.data, n * in_[2] * in_[3] * x.pitch, element_), x.pitch};
    const Convolution* next = chain_.data();
    for (size_t b = 0; b < lengths_.size(); ++b) {
      const Rows result{in_scratch_[b] ? scratch[2] : static_cast<char*>(result_data) + n * image_, out[1]};
      Rows from = input;
      for (int64_t i = 0; i + 1 < lengths_[b]; ++i) {
        const Rows to{scratch[i % 2], next->shape.out_channels[0]};
        convolve(*next++, from, {.out = to});
        from = to;
      }
      const bool projected = b == 0 && projection_;
      if (projected) convolve(*projection_, input, {.out = result, .relu = false});
      const Rows added = projected ? result : b > 0 || shortcut_ ? input : Rows{};
      convolve(*next++, from, {.out = result, .residual = added});
      input = result;
    }
  }
}

namespace {

Tensor residual_stage_packed_fwd(const Tensor& x, std::vector<Tensor> packed, Ints geometry, Ints lengths,
                                 bool shortcut, bool projects) {
  const char* op = "residual_stage_packed_fwd";
  check_4d(op, "x", x);
  const EngineStage stage(op, sizes_of(x), engine_dtype(op, x), packed.data(), packed.size(), geometry, lengths,
                          shortcut, projects);
  const Tensor out = empty_result(x, stage.out[1], stage.out[2], stage.out[3]);
  if (out.numel() == 0) return dense(out, result_format(x));
  const RowView in = rows_of(x);
  stage.run(in, out.data_ptr(), Scratch(stage.scratch_bytes).data());
  return dense(out, result_format(x));
}

}  // namespace
}  // namespace fused_cnn

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("residual_stage_packed_fwd", FUSED_CNN_BOX(&fused_cnn::residual_stage_packed_fwd));
}
