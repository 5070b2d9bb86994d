// Memory for the results of the CPU's kernels. The C library gives large blocks back to the system when they are freed,
// and the next call pays for fresh pages: a tenth of ResNet-50's time at batch 8. So large results come from a pool
// that keeps what was freed, up to kKept bytes, for the next result of that size.
#pragma once
#include <cstdlib>
#include <memory>
#include "shared/checks.h"

namespace fused_cnn {

// An uninitialised channels-last tensor for like's images. Its memory returns to the pool with its last reference; it
// cannot grow: resize_() raises on it, as on every tensor over memory that PyTorch did not allocate.
Tensor empty_result(const Tensor& like, int64_t channels, int64_t height, int64_t width);

// Uninitialised memory that grows as it is asked for more, and is kept until its owner, a thread or a call, ends.
class Workspace {
 public:
  void* at_least(int64_t bytes);

 private:
  std::unique_ptr<void, void (*)(void*)> data_{nullptr, std::free};
  int64_t bytes_ = 0;
};

}  // namespace fused_cnn
