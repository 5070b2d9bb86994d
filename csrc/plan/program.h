// A network in eval as a program: what fused_cnn::run_plan is given, read and checked before any memory is touched.
// Values are activations (N, C, H, W), numbered: the inputs, then each step's result. A step is its kind and what
// follows here, one number after the other (fused_cnn/ops/plan/op.py writes them):
//   convolution     x, residual or -1, weight (its place among the constants), weight's shape (4), stride, padding and
//                   dilation (2 each), relu
//   max pool        x, kernel, stride, padding and dilation (2 each), ceil_mode
//   residual stage  x, first weight, blocks, shortcut, projects, each block's length, each convolution's geometry
//                   (kGeometry each, the projection's last: conv/residual_stage.h)
//   inception       x, first of four weights, six channel counts, two kernel sizes
//   average         x: the mean of each channel's pixels
//   concatenation   count, values: of their channels
#pragma once
#include <variant>
#include "conv/cpu_stage.h"
#include "inception/cpu_block.h"

namespace fused_cnn::plan {

struct Convolution {
  engine::ConvShape shape;
  const void* packed;
  bool relu;
};
struct MaxPool {
  engine::Window window;
};
struct Average {};
struct Concatenation {};

struct Step {
  Ints reads;  // values; a convolution's residual is the second
  Ints out;    // the result's sizes
  int64_t scratch_bytes = 0;
  std::variant<Convolution, MaxPool, EngineStage, EngineInception, Average, Concatenation> work;
};

struct Program {
  std::vector<Ints> inputs;  // sizes
  std::vector<Step> steps;

  int64_t values() const { return static_cast<int64_t>(inputs.size() + steps.size()); }
  const Ints& sizes(int64_t value) const {
    return value < static_cast<int64_t>(inputs.size()) ? inputs[value] : steps[value - inputs.size()].out;
  }
};

// Without constants the sizes alone are worked out.
Program read(const char* op, std::vector<Ints> inputs, DType dtype, const std::vector<Tensor>* constants,
             const Ints& program);

constexpr int64_t kElsewhere = -1;  // of a value that does not lie in the arena

// Where values lie that are neither inputs nor results: as long as one is needed its place is its own.
struct Layout {
  std::vector<int64_t> offset;    // by value, in bytes
  std::vector<int64_t> slice_of;  // by value: the concatenation that it is written into, or -1
  std::vector<int64_t> first;     // by value: its first channel there
  std::vector<int64_t> scratch;   // by step
  int64_t bytes = 0, without_overlap = 0;
};
Layout layout_of(const Program& program, const Ints& results, int64_t element_bytes);

}  // namespace fused_cnn::plan
