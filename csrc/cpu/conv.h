// What lies between PyTorch's tensors and the CPU convolutions. A weight that was packed once runs on the engine
// (engine/conv_engine.h). A plain weight runs on PyTorch's convolution (oneDNN) with the epilogue in one pass behind
// it: packing at every call would cost what the convolution itself does on small images.
#pragma once
#include "cpu/engine/conv_engine.h"
#include "shared/aten_conv.h"
#include "shared/rows.h"

namespace fused_cnn {

// Convolutions without groups and max pools of float32 and bfloat16.
bool engine_supports(const Tensor& x);

// The element type of x, which the engine must support.
DType engine_dtype(const char* op, const Tensor& x);

// What a kernel meets on an input of the sizes (N, C, H, W), and such a convolution.
engine::Window window_of(const Ints& sizes, const Pair& kernel, const ConvParams& params);
engine::ConvShape conv_shape(const Ints& sizes, int64_t out_channels, const Pair& kernel, const ConvParams& params);

inline Ints sizes_of(const Tensor& x) {
  return {x.size(0), x.size(1), x.size(2), x.size(3)};
}

// One buffer of bytes that holds the weights and biases of convolutions sharing an input; biases are float32 or absent.
Tensor engine_pack(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                   const Pair& stride = {1, 1}, const Pair& dilation = {1, 1});
void check_packed(const char* op, const Tensor& packed, const engine::ConvShape& shape, DType dtype);

// relu(conv(x, weight) + bias [+ residual]) of a plain weight.
Tensor cpu_conv_forward(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& residual, const ConvParams& params, bool relu);

}  // namespace fused_cnn
