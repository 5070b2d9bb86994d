// An Inception block on the engine, in eval form, for whoever brings the memory: the op of a block, and a plan.
#pragma once
#include "cpu/conv.h"

namespace fused_cnn {

class EngineInception {
 public:
  // For inputs of the sizes (N, C, H, W). `packed` has four tensors; without them the sizes alone are worked out.
  EngineInception(const char* op, const Ints& sizes, DType dtype, const Tensor* packed, const Ints& channels,
                  const Ints& kernels);

  Ints out;               // the result's sizes
  int64_t scratch_bytes;  // 64-byte aligned

  // The result may be a slice of the channels of something wider.
  void run(Rows x, Rows result, void* scratch) const;

 private:
  DType dtype_;
  int64_t element_;
  engine::ConvShape merged_, convolutions_[3];  // the three 1x1 ones of x as one; 3x3, k x k and the projection
  engine::Window pool_;
  const void* packed_[4] = {};
  int64_t reduced3_bytes_;
};

}  // namespace fused_cnn
