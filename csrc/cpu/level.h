// One kernel source, several instruction sets. setup.py compiles every csrc/**/cpu_kernels.cpp once per level, each
// time with FUSED_CNN_LEVEL set to the level's name, which is also the namespace that the kernels land in.
// FUSED_CNN_KERNEL declares a kernel at every level; FUSED_CNN_PICK is the best one that this processor runs, at run
// time. Kernel files must not instantiate standard-library templates: the linker keeps one copy of those, and it might
// be the AVX-512 one.
#pragma once
#include <array>

namespace fused_cnn {

enum class CpuLevel { generic, avx2, avx512, avx512_bf16, amx };
CpuLevel cpu_level();

// What Python asks of the library beside its ops are C functions: it needs no Python to load, and so fits every version
// of it.
#define FUSED_CNN_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
#define FUSED_CNN_AT_LEVELS(macro, ...)                                                                           \
  macro(generic, __VA_ARGS__) macro(avx2, __VA_ARGS__) macro(avx512, __VA_ARGS__) macro(avx512_bf16, __VA_ARGS__) \
      macro(amx, __VA_ARGS__)
#else
#define FUSED_CNN_AT_LEVELS(macro, ...) macro(generic, __VA_ARGS__)
#endif

#define FUSED_CNN_DECLARE(level, ...) \
  namespace level {                   \
  __VA_ARGS__;                        \
  }
#define FUSED_CNN_KERNEL(...) FUSED_CNN_AT_LEVELS(FUSED_CNN_DECLARE, __VA_ARGS__)

#define FUSED_CNN_ADDRESS(level, name) &level::name,
#define FUSED_CNN_PICK(name) \
  (*std::array{FUSED_CNN_AT_LEVELS(FUSED_CNN_ADDRESS, name)}[static_cast<int>(::fused_cnn::cpu_level())])

}  // namespace fused_cnn
