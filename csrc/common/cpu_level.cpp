// Which instruction set the CPU kernels use: the best that was built and that this processor has, asked once.
#include "common/cpu_level.h"

#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fused_cnn {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16"};

CpuLevel best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return CpuLevel::avx512_bf16;
  if (avx512) return CpuLevel::avx512;
  return avx2 ? CpuLevel::avx2 : CpuLevel::generic;
#else
  return CpuLevel::generic;
#endif
}

CpuLevel& current() {
  static CpuLevel level = best_level();
  return level;
}

}  // namespace

CpuLevel cpu_level() {
  return current();
}

const char* cpu_level_name() {
  return kNames[static_cast<int>(current())];
}

bool has_amx_bf16() {
#if defined(__x86_64__)
  static const bool found = [] {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 22 & 1) != 0;
  }();
  return found;
#else
  return false;
#endif
}

bool set_cpu_level(const char* name) {
  static const CpuLevel best = best_level();
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (std::strcmp(kNames[i], name) == 0) return current() = static_cast<CpuLevel>(i), true;
  }
  return false;
}

}  // namespace fused_cnn
