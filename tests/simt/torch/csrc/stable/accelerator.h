// torch/csrc/stable/accelerator.h with a guard that takes tensors on the CPU.
#pragma once
#define DeviceGuard AcceleratorGuard
#include_next <torch/csrc/stable/accelerator.h>
#undef DeviceGuard

namespace torch::stable::accelerator {
struct DeviceGuard {
  explicit DeviceGuard(DeviceIndex) {}
};
}  // namespace torch::stable::accelerator
