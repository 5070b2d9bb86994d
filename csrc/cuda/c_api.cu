// What Python asks of the CUDA library beside its ops, as C functions: the tiles of the forward product, and the choice
// among them (cuda/gemm/choices.h).
#include <algorithm>
#include <cstring>
#include "cuda/gemm/choices.h"

#define FUSED_CNN_EXPORT extern "C" __attribute__((visibility("default")))

using fused_cnn::GemmChoices;

// Fills (m, n, k) of each tile, as many as `capacity` allows; returns how many there are.
FUSED_CNN_EXPORT int fused_cnn_gemm_tiles(int sizes[][3], int capacity) {
  for (int i = 0; i < std::min(capacity, fused_cnn::kGemmTileCount); ++i) {
    const fused_cnn::GemmTile& tile = fused_cnn::kGemmTiles[i];
    sizes[i][0] = tile.m;
    sizes[i][1] = tile.n;
    sizes[i][2] = tile.k;
  }
  return fused_cnn::kGemmTileCount;
}

// The product of this problem (device, dtype, m, n, k) runs with this tile from now on; false where there is no such.
FUSED_CNN_EXPORT bool fused_cnn_choose_gemm_tile(const int64_t problem[5], int tile) {
  if (tile < 0 || tile >= fused_cnn::kGemmTileCount) return false;
  GemmChoices::Problem key;
  std::copy_n(problem, key.size(), key.begin());
  GemmChoices::instance().choose(key, tile);
  return true;
}

// Begins to record the problems of forward products, or (on = false) ends it, fills as many as `capacity` allows and
// returns how many there were.
FUSED_CNN_EXPORT int64_t fused_cnn_record_gemms(bool on, int64_t problems[][5], int64_t capacity) {
  const std::vector<GemmChoices::Problem> found = GemmChoices::instance().record(on);
  const int64_t count = static_cast<int64_t>(found.size());
  for (int64_t i = 0; i < std::min(capacity, count); ++i) std::copy_n(found[i].begin(), found[i].size(), problems[i]);
  return count;
}
