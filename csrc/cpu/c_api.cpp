// What Python asks of the CPU library beside its ops, as C functions: the library needs no Python to load, and so fits
// every version of it.
#include "cpu/conv.h"
#include "cpu/level.h"

#define FUSED_CNN_EXPORT extern "C" __attribute__((visibility("default")))

FUSED_CNN_EXPORT const char* fused_cnn_cpu_level() {
  return fused_cnn::cpu_level_name();
}

// See set_cpu_level.
FUSED_CNN_EXPORT bool fused_cnn_set_cpu_level(const char* name) {
  return fused_cnn::set_cpu_level(name);
}

// What a convolution of x (N, C, H, W) with a packed weight does in the form in which it runs: the bytes that it reads
// of the weight, which may be packed in two forms, and the floating-point operations of its products. kernel, stride,
// padding and dilation are (h, w) each.
FUSED_CNN_EXPORT void fused_cnn_conv_work(const int64_t x[4], int64_t out_channels, const int64_t kernel[2],
                                          const int64_t stride[2], const int64_t padding[2], const int64_t dilation[2],
                                          bool bfloat16, bool in_place, int64_t bytes_and_flops[2]) {
  using namespace fused_cnn;
  const auto pair = [](const int64_t* v) { return Ints{v[0], v[1]}; };
  const engine::ConvShape shape = conv_shape({x[0], x[1], x[2], x[3]}, out_channels, pair(kernel),
                                             {pair(stride), pair(padding), pair(dilation), /*groups=*/1});
  const DType dtype = bfloat16 ? DType::bf16 : DType::f32;
  bytes_and_flops[0] = engine::packed_bytes_read(shape, dtype, in_place);
  bytes_and_flops[1] = 2 * engine::multiply_adds(shape, dtype, in_place);
}
