// Which tile a forward product runs with: the one that the device's table has for its shape, else the first in the
// order of kGemmTiles whose predicate holds. Python hands the table's entries over, and asks which products a call
// consists of when it measures them (fused_cnn/tuning.py).
#pragma once
#include <array>
#include <map>
#include <mutex>
#include <utility>
#include <vector>
#include "cuda/gemm/gemm.h"

namespace fused_cnn {

class GemmChoices {
 public:
  using Problem = std::array<int64_t, 5>;  // device, dtype, m, n, k

  static GemmChoices& instance() {
    static GemmChoices choices;
    return choices;
  }

  int tile(const Gemm& gemm, int device, int multiprocessors) {
    const Problem problem{device, static_cast<int64_t>(gemm.dtype), gemm.m, gemm.n, gemm.k};
    {
      const std::lock_guard lock(mutex_);
      if (recording_) recorded_.push_back(problem);
      if (const auto found = chosen_.find(problem); found != chosen_.end()) return found->second;
    }
    int i = 0;
    while (i + 1 < kGemmTileCount && !kGemmTiles[i].when(gemm, multiprocessors)) ++i;
    return i;
  }

  void choose(const Problem& problem, int tile) {
    const std::lock_guard lock(mutex_);
    chosen_[problem] = tile;
  }

  // Begins, or ends and returns what was recorded.
  std::vector<Problem> record(bool on) {
    const std::lock_guard lock(mutex_);
    recording_ = on;
    return std::exchange(recorded_, {});
  }

 private:
  std::mutex mutex_;
  std::map<Problem, int> chosen_;
  bool recording_ = false;
  std::vector<Problem> recorded_;
};

}  // namespace fused_cnn
