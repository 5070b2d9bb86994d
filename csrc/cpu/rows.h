// Activations as the CPU's loops and its engine see them.
#pragma once
#include "shared/dtype.h"

namespace fused_cnn {

// Rows (pixels) of adjacent channels, `pitch` elements apart; data is null where there are none.
struct Rows {
  void* data = nullptr;
  int64_t pitch = 0;

  template <typename T>
  FUSED_CNN_HD T* at(int64_t row) const {
    return static_cast<T*>(data) + row * pitch;
  }
};

}  // namespace fused_cnn
