// Which tile a problem runs with: the one that the device's table has for it, else the first in the architecture's
// order whose predicate holds; never one that gave wrong results there (fused_cnn/_first_use.py). Python hands both
// over, and asks which problems a call consists of when it measures them (fused_cnn/tuning.py), through C functions.
// There a problem is the values of Problem in order, a tile {kind, m, n, k}.
#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <utility>
#include <vector>
#include "cuda/gemm/context.h"
#include "cuda/gemm/tiles.h"

#define FUSED_CNN_EXPORT extern "C" __attribute__((visibility("default")))

namespace fused_cnn {
namespace {

constexpr int kProblemValues = sizeof(Problem) / sizeof(int64_t);

std::mutex mutex;  // for all that follows
std::map<Problem, const Tile*> chosen;
std::set<std::tuple<int64_t, int64_t, const Tile*>> refused;  // device, dtype, tile
bool recording = false;
std::vector<Problem> recorded;

thread_local bool takes_tf32 = false;

Problem problem_of(const int64_t* values) {
  Problem problem;
  std::copy_n(values, kProblemValues, &problem.device);
  return problem;
}

bool is_named(const Tile& tile, const int* name) {
  return static_cast<int>(tile.kind) == name[0] && tile.m == name[1] && tile.n == name[2] && tile.k == name[3];
}

bool may_run(const Tile& tile, const Problem& problem) {
  return tile.suits(problem) && !refused.contains({problem.device, problem.dtype, &tile});
}

// The caller holds the mutex.
std::vector<const Tile*> suitable(const Problem& problem, int major) {
  std::vector<const Tile*> found;
  const TensorCores* cores = tensor_cores(major);
  if (!cores) return found;
  for (const Tile& tile : cores->tiles) {
    if (may_run(tile, problem)) found.push_back(&tile);
  }
  return found;
}

}  // namespace

const Tile& tile_for(const Problem& problem, std::span<const Tile> candidates, int multiprocessors) {
  const std::lock_guard lock(mutex);
  if (recording) {
    recorded.push_back(problem);
    return candidates.back();  // the library's, which runs wherever it is asked to
  }
  if (const auto found = chosen.find(problem); found != chosen.end()) return *found->second;
  return *std::find_if(candidates.begin(), std::prev(candidates.end()),
                       [&](const Tile& tile) { return may_run(tile, problem) && tile.when(problem, multiprocessors); });
}

bool tf32_allowed() {
  constexpr int kConvolutions = 1;  // at::Float32Op::CONV
  if (takes_tf32) return true;
  if (!fused_cnn_context || !fused_cnn_cudnn_enabled || !fused_cnn_cudnn_allows_tf32) return false;
  const void* context = fused_cnn_context();
  return fused_cnn_cudnn_enabled(context) && fused_cnn_cudnn_allows_tf32(context, kConvolutions);
}

}  // namespace fused_cnn

using namespace fused_cnn;

// How many values a problem has, and, of at most `capacity` of them, the tiles that may run it on a GPU of compute
// capability major.x; returns how many there are.
FUSED_CNN_EXPORT int fused_cnn_problem_values() {
  return kProblemValues;
}

FUSED_CNN_EXPORT int fused_cnn_tiles(const int64_t* problem, int major, int tiles[][4], int capacity) {
  const std::lock_guard lock(mutex);
  const std::vector<const Tile*> found = suitable(problem_of(problem), major);
  for (int i = 0; i < std::min<int>(capacity, found.size()); ++i) {
    tiles[i][0] = static_cast<int>(found[i]->kind);
    tiles[i][1] = found[i]->m;
    tiles[i][2] = found[i]->n;
    tiles[i][3] = found[i]->k;
  }
  return static_cast<int>(found.size());
}

// This problem runs with this tile from now on, or, where that is null, by the predicates' order again; false where no
// such tile may run it.
FUSED_CNN_EXPORT bool fused_cnn_choose_tile(const int64_t* values, int major, const int* tile) {
  const Problem problem = problem_of(values);
  const std::lock_guard lock(mutex);
  if (!tile) {
    chosen.erase(problem);
    return true;
  }
  for (const Tile* candidate : suitable(problem, major)) {
    if (is_named(*candidate, tile)) {
      chosen[problem] = candidate;
      return true;
    }
  }
  return false;
}

// No problem of this one's device and dtype runs with this tile from now on, or (refuse = false) all may again; false
// where it is the library's, which always may, or none of the architecture's.
FUSED_CNN_EXPORT bool fused_cnn_refuse_tile(const int64_t* values, int major, const int* tile, bool refuse) {
  const Problem problem = problem_of(values);
  const TensorCores* cores = tensor_cores(major);
  if (!cores) return false;
  const std::lock_guard lock(mutex);
  for (const Tile& candidate : cores->tiles) {
    if (candidate.is_library() || !is_named(candidate, tile)) continue;
    if (!refuse) {
      refused.erase({problem.device, problem.dtype, &candidate});
      return true;
    }
    refused.emplace(problem.device, problem.dtype, &candidate);
    std::erase_if(chosen, [&](const auto& entry) {
      return entry.second == &candidate && entry.first.device == problem.device && entry.first.dtype == problem.dtype;
    });
    return true;
  }
  return false;
}

// Where the rows of a weight begin whose result is one of several slices: at multiples of this.
FUSED_CNN_EXPORT int fused_cnn_slice_step(int major) {
  const TensorCores* cores = tensor_cores(major);
  return cores ? cores->slice_step : 1;
}

// Begins to record problems, which then run by the library, or (on = false) ends it, fills as many as `capacity` allows
// and returns how many there were.
FUSED_CNN_EXPORT int64_t fused_cnn_record_problems(bool on, int64_t* values, int64_t capacity) {
  const std::lock_guard lock(mutex);
  recording = on;
  const std::vector<Problem> found = std::exchange(recorded, {});
  const int64_t count = static_cast<int64_t>(found.size());
  for (int64_t i = 0; i < std::min(capacity, count); ++i) {
    std::copy_n(&found[i].device, kProblemValues, values + i * kProblemValues);
  }
  return count;
}

// This thread's convolutions of float32 may be in TF32 whatever PyTorch's switch says, or (on = false) as it says
// again: a comparison asks for it, and must not change what another thread computes meanwhile.
FUSED_CNN_EXPORT void fused_cnn_take_tf32(bool on) {
  takes_tf32 = on;
}
