// One kernel source, several instruction sets. setup.py compiles every csrc/**/cpu_kernels.cpp once per level, each
// time with FUSED_CNN_LEVEL set to the level's name, which is also the namespace that the kernels land in.
// FUSED_CNN_KERNEL declares a kernel at every level; FUSED_CNN_PICK takes the best one that this processor runs, at run
// time. Kernel files must not instantiate standard-library templates: the linker keeps one copy of those, and it might
// be the AVX-512 one.
#pragma once

namespace fused_cnn {

enum class CpuLevel { generic, avx2, avx512, avx512_bf16, amx };
CpuLevel cpu_level();
const char* cpu_level_name();

// Uses a lower level from now on, for tests; false, changing nothing, where the processor lacks it. Packed weights do
// not carry over.
bool set_cpu_level(const char* name);

#if defined(__x86_64__)
#define FUSED_CNN_KERNEL(...) \
  namespace generic {         \
  __VA_ARGS__;                \
  }                           \
  namespace avx2 {            \
  __VA_ARGS__;                \
  }                           \
  namespace avx512 {          \
  __VA_ARGS__;                \
  }                           \
  namespace avx512_bf16 {     \
  __VA_ARGS__;                \
  }                           \
  namespace amx {             \
  __VA_ARGS__;                \
  }
#define FUSED_CNN_PICK(name)                                                            \
  (::fused_cnn::cpu_level() == ::fused_cnn::CpuLevel::amx           ? amx::name         \
   : ::fused_cnn::cpu_level() == ::fused_cnn::CpuLevel::avx512_bf16 ? avx512_bf16::name \
   : ::fused_cnn::cpu_level() == ::fused_cnn::CpuLevel::avx512      ? avx512::name      \
   : ::fused_cnn::cpu_level() == ::fused_cnn::CpuLevel::avx2        ? avx2::name        \
                                                                    : generic::name)
#else
#define FUSED_CNN_KERNEL(...) \
  namespace generic {         \
  __VA_ARGS__;                \
  }
#define FUSED_CNN_PICK(name) generic::name
#endif

}  // namespace fused_cnn
