// CPU convolution on channels-last activations, with everything that follows it fused in:
//
//   out[n,oy,ox,o] = act( bias[o] + residual[n,oy,ox,o]
//                         + sum over kh,kw,c of x[n, oy*s + kh*d - p, ox*s + kw*d - p, c] * weight[o,c,kh,kw] )
//
// and max pooling, in float32 and bfloat16 (which accumulates in float32, and has float32 biases). This is the whole
// interface of the engine, which README.md explains: the caller owns every buffer and packs the weight once. An
// activation may be a channel slice of a wider tensor; nothing outside the slice is ever read into the result or
// written.
#pragma once
#include "shared/branches.h"

namespace fused_cnn::engine {

constexpr int kMaxDestinations = 4;

struct Extent {
  int64_t h, w;
};

// What a convolution or a pool reads, and the size of what it writes. Padding is on both sides; a pool's windows are
// clipped to the input.
struct Window {
  int64_t N, C, H, W;
  Extent kernel, stride, pad, dilation, out;
};

// Convolutions that share x and the window run as one: `out_channels` lists the channels of each.
struct ConvShape : Window {
  int64_t out_channels[kMaxDestinations] = {};
  int destinations = 1;
  int64_t batch = 0;  // images of the whole call, N or more: a caller may pass some at a time, and gets the same sums
};

struct Destination {
  Rows out;            // [N, out_h, out_w, out_channels]
  Rows residual = {};  // of the same extent, or null; may be `out` itself
  bool relu = true;    // max(v, 0) that keeps NaN
};

struct ConvArgs {
  Rows x;
  const void* packed;  // from pack_weight, 64-byte aligned
  Destination destination[kMaxDestinations];
};

// Bytes of the packed weight and bias. The layout belongs to this process's CPU level: never store it on disk.
// N, H, W and padding do not matter to either function, so one packed weight serves every input size.
int64_t packed_weight_bytes(const ConvShape& shape, DType dtype);

// weight[i] is contiguous [out_channels[i], C, kernel_h, kernel_w]; bias[i] has out_channels[i] floats, or is null.
void pack_weight(const ConvShape& shape, DType dtype, const void* const* weight, const float* const* bias,
                 void* packed);

// What a call of the whole batch does, whose residual is (in_place) or is not where its output goes: how many of the
// packed bytes it reads, and its multiply-adds, those of a direct convolution or the fewer of Winograd's form.
struct ConvWork {
  int64_t packed_bytes, multiply_adds;
};
ConvWork conv_work(const ConvShape& shape, DType dtype, bool in_place);

void conv_forward(const ConvShape& shape, DType dtype, const ConvArgs& args);

// out is dense.
void max_pool(const Window& window, DType dtype, Rows x, void* out);

// grad_x[n,h,w,c] of a max pool; grad_out and grad_x are dense. Needs no indices.
void max_pool_backward(const Window& window, DType dtype, Rows x, const void* grad_out, void* grad_x);

}  // namespace fused_cnn::engine
