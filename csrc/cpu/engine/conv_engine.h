// CPU convolution on channels-last activations, with everything that follows it fused in:
//
//   out[n,oy,ox,o] = act( bias[o] + residual[n,oy,ox,o]
//                         + sum over kh,kw,c of x[n, oy*s + kh*d - p, ox*s + kw*d - p, c] * weight[o,c,kh,kw] )
//
// This is the whole public interface. It is plain C++ (no torch): the caller owns every buffer, names the thread pool,
// and packs the weight once. An activation is a pointer to N*H*W pixels that lie `pitch` elements apart, pitch >= C, so
// it may be a channel slice of a wider tensor; nothing outside the slice is ever read into the result or written.
#pragma once
#include <cstdint>

namespace fused_cnn::engine {

enum class DType { f32, bf16 };  // bf16 accumulates in f32; bias is f32 in both.

constexpr int kMaxDestinations = 4;

// Convolutions that share x, and all of the sizes below, run as one: `out_channels` lists the channels of each.
struct ConvShape {
  int64_t N, C, H, W;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;  // zeros on both sides
  int64_t dilation_h, dilation_w;
  int destinations;
  int64_t out_channels[kMaxDestinations];
  int64_t batch;  // images of the whole call, N or more: a caller may pass some at a time, and gets the same sums
};

struct Destination {
  void* out;  // [N, out_h, out_w, out_channels], pixels `pitch` elements apart
  int64_t pitch;
  const void* residual;  // same extent as out, or null; may be `out` itself
  int64_t residual_pitch;
  bool relu;  // max(v, 0) that keeps NaN
};

struct ConvArgs {
  const void* x;
  int64_t x_pitch;
  const void* packed;  // from pack_weight, 64-byte aligned
  Destination destination[kMaxDestinations];
};

// Calls fn(begin, end, context) over disjoint pieces of [0, count), at least `grain` long, possibly concurrently.
struct ThreadPool {
  int threads;
  void (*parallel_for)(int64_t count, int64_t grain, void (*fn)(int64_t, int64_t, void*), void* context);
};

struct PoolShape {
  int64_t N, C, H, W;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;  // -inf on both sides
  int64_t dilation_h, dilation_w;
  int64_t out_h, out_w;  // the caller applies ceil_mode; windows are clipped to the input
};

int64_t conv_out_h(const ConvShape& shape);
int64_t conv_out_w(const ConvShape& shape);

// Bytes of the packed weight and bias. The layout belongs to this process's CPU level: never store it on disk.
// N, H, W and padding do not matter to either function, so one packed weight serves every input size.
int64_t packed_weight_bytes(const ConvShape& shape, DType dtype);

// weight[i] is contiguous [out_channels[i], C, kernel_h, kernel_w]; bias[i] has out_channels[i] floats, or is null.
void pack_weight(const ConvShape& shape, DType dtype, const void* const* weight, const float* const* bias,
                 void* packed);

// How many of them a call of the whole batch reads, whose residual is (in_place) or is not where its output goes.
int64_t packed_bytes_read(const ConvShape& shape, DType dtype, bool in_place);

// The multiply-adds of the same call: of a direct convolution, or the fewer that Winograd's form does.
int64_t multiply_adds(const ConvShape& shape, DType dtype, bool in_place);

void conv_forward(const ConvShape& shape, DType dtype, const ConvArgs& args, const ThreadPool& pool);

void max_pool(const PoolShape& shape, DType dtype, const void* x, int64_t x_pitch, void* out, int64_t out_pitch,
              const ThreadPool& pool);

// grad_x[n,h,w,c] of a max pool; grad_out and grad_x are dense, x may have a pitch. Needs no indices.
void max_pool_backward(const PoolShape& shape, DType dtype, const void* x, int64_t x_pitch, const void* grad_out,
                       void* grad_x, const ThreadPool& pool);

}  // namespace fused_cnn::engine
