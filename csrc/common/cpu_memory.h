// Memory for the results of the CPU's kernels. The C library gives large blocks back to the system when they are freed,
// and the next call pays for fresh pages: a tenth of ResNet-50's time at batch 8. So large results come from a pool that
// keeps what was freed, up to kKept bytes, for the next result of that size.
#pragma once
#include "common/checks.h"

namespace fused_cnn {

// An uninitialised channels-last tensor for like's images. Its memory returns to the pool with its last reference.
Tensor empty_result(const Tensor& like, int64_t channels, int64_t height, int64_t width);

// An uninitialised result, (N, channels, H, W) as `like`, written in rows; finish() gives it the layout that
// callers see.
struct RowResult {
  MemoryFormat format;
  bool in_place;
  Tensor tensor;
  void* data;

  RowResult(const Tensor& like, int64_t channels, MemoryFormat format)
      : format(format),
        // With one channel or one pixel both layouts are the same bytes; the strides must still be the
        // format's own.
        in_place(format == MemoryFormat::ChannelsLast || channels == 1 || like.size(2) * like.size(3) == 1),
        tensor(in_place && format == MemoryFormat::Contiguous
                   ? empty_nchw(like, channels, like.size(2), like.size(3), format)
                   : empty_result(like, channels, like.size(2), like.size(3))),
        data(tensor.data_ptr()) {}
  Tensor finish() const { return in_place ? tensor : dense(tensor, format); }
};

}  // namespace fused_cnn
