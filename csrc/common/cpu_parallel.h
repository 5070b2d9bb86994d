// Splits n elements over PyTorch's CPU threads; a thread gets at least kGrain of them, so that small tensors stay on one.
#pragma once
#include <torch/csrc/stable/ops.h>

namespace fused_cnn {

constexpr int64_t kGrain = 1 << 15;

template <typename F>
void parallel_elements(int64_t n, const F& body) {
  if (n > 0) torch::stable::parallel_for(0, n, kGrain, body);
}

inline const char* at(const void* base, int64_t index, int64_t element_size) {
  return static_cast<const char*>(base) + index * element_size;
}
inline char* at(void* base, int64_t index, int64_t element_size) {
  return static_cast<char*>(base) + index * element_size;
}

}  // namespace fused_cnn
