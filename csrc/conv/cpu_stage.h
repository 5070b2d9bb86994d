// Residual blocks one after the other on the engine, for whoever brings the memory: the op of a stage, and a plan.
// A few images go through all the blocks before the next ones: what lies between the convolutions then stays in cache,
// and memory sees the input and the result alone. A projection is written where the result goes, and added there; a
// block that ends in a 1x1 convolution adds to its input where it lies.
#pragma once
#include "conv/residual_stage.h"
#include "cpu/conv.h"

namespace fused_cnn {

class EngineStage {
 public:
  // For inputs of the sizes (N, C, H, W). `packed` has `weights` tensors; without them the sizes alone are worked out.
  EngineStage(const char* op, const Ints& sizes, DType dtype, const Tensor* packed, int64_t weights,
              const Ints& geometry, const Ints& lengths, bool shortcut, bool projects);

  Ints out;               // the result's sizes
  int64_t scratch_bytes;  // 64-byte aligned

  // The result is dense.
  void run(Rows x, void* result, void* scratch) const;

 private:
  struct Convolution {
    engine::ConvShape shape;
    const void* packed;
  };

  DType dtype_;
  Ints in_, lengths_;
  bool shortcut_;
  std::vector<Convolution> chain_;
  std::optional<Convolution> projection_;
  std::vector<bool> in_scratch_;      // whether a block's result goes to the scratch memory
  int64_t images_, element_, image_;  // at once; bytes of an element, and of one image's result
  int64_t bytes_[2];                  // of what lies between convolutions, in turn
};

}  // namespace fused_cnn
