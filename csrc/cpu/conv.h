// What the convolution rooms share on the CPU. A weight that was packed once runs on the project's own convolution
// (engine/conv_engine.h; float32 and bfloat16, groups == 1). A plain weight runs on the library's with the epilogue in
// one pass behind it: packing at every call would cost what the convolution itself does on small images.
#pragma once
#include <memory>
#include "cpu/memory.h"
#include "cpu/engine/conv_engine.h"
#include "shared/aten_conv.h"

namespace fused_cnn {

// An activation as the engine reads it: pixels `pitch` elements apart, channels adjacent. Copies only what is laid out
// otherwise.
struct Pixels {
  explicit Pixels(const Tensor& t);
  Tensor tensor;
  int64_t pitch;
  void* data() const { return tensor.data_ptr(); }
};

bool engine_takes(const Tensor& x, int64_t groups);
engine::DType engine_dtype(const Tensor& x);
engine::ThreadPool engine_threads();
engine::ConvShape engine_shape(int64_t images, int64_t channels, int64_t height, int64_t width, int64_t out_channels,
                               const Ints& kernel, const ConvParams& params);

// How many of the images to take through a whole block before the next, given what lies between the block's
// convolutions for each image: as many as leave that in the threads' caches, so that it does not travel to memory.
int64_t images_at_once(int64_t images, int64_t bytes_between);

// Memory for what lies between a block's convolutions. As much as images_at_once plans for is the calling thread's own
// and kept for its next block: it is in cache then, and mapped.
class Between {
 public:
  explicit Between(int64_t bytes);
  void* data() const { return data_; }

 private:
  std::unique_ptr<void, void (*)(void*)> own_;
  void* data_;
};

// One buffer of bytes that holds the weights and biases of convolutions sharing an input; biases are float32 or absent.
Tensor engine_pack(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                   const Ints& stride = {1, 1}, const Ints& dilation = {1, 1});
void check_packed(const char* op, const Tensor& packed, const engine::ConvShape& shape, engine::DType dtype);

Tensor cpu_conv_packed(const char* op, const Tensor& x, const Tensor& packed, const Ints& weight_shape,
                       const std::optional<Tensor>& residual, const ConvParams& params, bool relu);

// relu(conv(x, weight) + bias [+ residual]), checked.
Tensor cpu_conv_forward(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& residual, const ConvParams& params, bool relu);

// (grad_x, grad_weight, grad_bias, grad): `grad` is grad_out under the ReLU mask of `out`, which is also residual's
// gradient; empty tensors for what is not needed, and for `grad` where there is no ReLU (it would be grad_out itself).
std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_conv_backward(const char* op, const Tensor& grad_out,
                                                             const std::optional<Tensor>& out, const Tensor& x,
                                                             const Tensor& weight, const ConvParams& params,
                                                             bool needs_x, bool needs_weight, bool needs_bias);

}  // namespace fused_cnn
