// PyTorch's settings (at::Context), for which its stable ABI has no question; asked if they are there, as they are in
// PyTorch 2.10 to 2.14.
#pragma once
#include <optional>

extern "C" {
__attribute__((weak)) const void* fused_cnn_context() __asm__("_ZN2at13globalContextEv");
__attribute__((weak)) bool fused_cnn_cudnn_enabled(const void*) __asm__("_ZNK2at7Context16userEnabledCuDNNEv");
__attribute__((weak)) bool fused_cnn_cudnn_deterministic(const void*) __asm__("_ZNK2at7Context18deterministicCuDNNEv");
__attribute__((weak)) bool fused_cnn_deterministic(const void*) __asm__("_ZNK2at7Context23deterministicAlgorithmsEv");
// Of an at::Float32Op, which is passed as the int that it is.
__attribute__((weak)) bool fused_cnn_cudnn_allows_tf32(const void*, std::optional<int>) __asm__(
    "_ZNK2at7Context14allowTF32CuDNNESt8optionalINS_9Float32OpEE");
}

namespace fused_cnn {

// Whether convolutions of float32 may be taken in TF32 at this moment: PyTorch's switch for cuDNN's says so, or this
// thread was told to by fused_cnn_take_tf32 (cuda/choices.cu).
bool tf32_allowed();

}  // namespace fused_cnn
