// Which instruction set the CPU kernels use: the best that was built and that this processor has, asked once.
#include "cpu/level.h"

#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused_cnn {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// The matrix units' registers are 8 KiB per thread, which Linux sets aside only for a process that asks.
bool may_use_amx() {
#if defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAmxBf16) != 0 && (d & kAmxTile) != 0 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

CpuLevel best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx512_bf16) return may_use_amx() ? CpuLevel::amx : CpuLevel::avx512_bf16;
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

}  // namespace fused_cnn

FUSED_CNN_EXPORT const char* fused_cnn_cpu_level() {
  return fused_cnn::kNames[static_cast<int>(fused_cnn::cpu_level())];
}

// Uses a lower level from now on, for tests; false, changing nothing, where the processor lacks it. Packed weights do
// not carry over.
FUSED_CNN_EXPORT bool fused_cnn_set_cpu_level(const char* name) {
  using namespace fused_cnn;
  static const CpuLevel best = best_level();
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (std::strcmp(kNames[i], name) != 0) continue;
    current() = static_cast<CpuLevel>(i);
    return true;
  }
  return false;
}
