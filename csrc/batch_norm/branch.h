// What batch_norm's host code (ops.h) hands the loops and kernels of both devices.
#pragma once
#include "shared/branches.h"

namespace fused_cnn {

// What is added to x's normalised values: nothing, the residual as it is, or that normalised too.
enum class Residual { none, plain, normalized };

// Rows and, at their first channel, their statistics and parameters, in the compute type.
struct BnInput {
  Rows x;
  const void *mean = nullptr, *rstd = nullptr, *weight = nullptr, *bias = nullptr;
  const void* scale = nullptr;  // rstd * weight; on the CPU alone
};

struct BnBranch {
  int64_t channels = 0, first = 0;  // first: its place among the channels of all branches
  BnInput in[2] = {};               // x; the residual, of which a plain one has rows only
  Rows y = {};                      // forward: its slice of the result; backward: of grad_out
  void* grad[2] = {};               // backward: the gradients of x and of the residual, rows of `channels`
  bool training[2] = {};
  double eps = 0;
};

}  // namespace fused_cnn
