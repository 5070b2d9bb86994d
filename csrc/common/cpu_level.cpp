// Which instruction set the CPU kernels use: the best that was built and that this processor has, asked once.
#include "common/cpu_level.h"

namespace fused_cnn {

CpuLevel cpu_level() {
#if defined(__x86_64__)
  static const CpuLevel level = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return CpuLevel::avx512_bf16;
    if (avx512) return CpuLevel::avx512;
    return avx2 ? CpuLevel::avx2 : CpuLevel::generic;
  }();
  return level;
#else
  return CpuLevel::generic;
#endif
}

const char* cpu_level_name() {
  static constexpr const char* names[] = {"generic", "avx2", "avx512", "avx512_bf16"};
  return names[static_cast<int>(cpu_level())];
}

}  // namespace fused_cnn
