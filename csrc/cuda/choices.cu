// Which tile a forward product runs with: the one that the device's table has for its shape, else the first in the
// order of kGemmTiles whose predicate holds. Python hands the table's entries over, and asks which products a call
// consists of when it measures them (fused_cnn/tuning.py), through C functions.
#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <utility>
#include <vector>
#include "cuda/gemm/gemm.h"

#define FUSED_CNN_EXPORT extern "C" __attribute__((visibility("default")))

namespace fused_cnn {
namespace {

using Problem = std::array<int64_t, 5>;  // device, dtype, m, n, k

std::mutex mutex;  // for all that follows
std::map<Problem, int> chosen;
bool recording = false;
std::vector<Problem> recorded;

}  // namespace

int gemm_tile(const Gemm& gemm, int device, int multiprocessors) {
  const Problem problem{device, static_cast<int64_t>(gemm.dtype), gemm.m, gemm.n, gemm.k};
  const std::lock_guard lock(mutex);
  if (recording) recorded.push_back(problem);
  if (const auto found = chosen.find(problem); found != chosen.end()) return found->second;
  int i = 0;
  while (i + 1 < kGemmTileCount && !kGemmTiles[i].when(gemm, multiprocessors)) ++i;
  return i;
}

}  // namespace fused_cnn

using namespace fused_cnn;

// Fills (m, n, k) of each tile, as many as `capacity` allows; returns how many there are.
FUSED_CNN_EXPORT int fused_cnn_gemm_tiles(int sizes[][3], int capacity) {
  for (int i = 0; i < std::min(capacity, kGemmTileCount); ++i) {
    const GemmTile& tile = kGemmTiles[i];
    sizes[i][0] = tile.m;
    sizes[i][1] = tile.n;
    sizes[i][2] = tile.k;
  }
  return kGemmTileCount;
}

// The product of this problem (device, dtype, m, n, k) runs with this tile from now on, or by the predicates' order
// again where it is -1; false where there is no such tile.
FUSED_CNN_EXPORT bool fused_cnn_choose_gemm_tile(const int64_t problem[5], int tile) {
  if (tile < -1 || tile >= kGemmTileCount) return false;
  Problem key;
  std::copy_n(problem, key.size(), key.begin());
  const std::lock_guard lock(mutex);
  if (tile == -1) {
    chosen.erase(key);
  } else {
    chosen[key] = tile;
  }
  return true;
}

// Begins to record the problems of forward products, or (on = false) ends it, fills as many as `capacity` allows and
// returns how many there were.
FUSED_CNN_EXPORT int64_t fused_cnn_record_gemms(bool on, int64_t problems[][5], int64_t capacity) {
  const std::lock_guard lock(mutex);
  recording = on;
  const std::vector<Problem> found = std::exchange(recorded, {});
  const int64_t count = static_cast<int64_t>(found.size());
  for (int64_t i = 0; i < std::min(capacity, count); ++i) std::copy_n(found[i].begin(), found[i].size(), problems[i]);
  return count;
}
