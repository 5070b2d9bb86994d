// Splits work over PyTorch's CPU threads; a thread gets at least kGrain elements, so that small tensors stay on one.
// Reductions over rows use RowTasks: a split that depends on the shape alone, so that sums are the same to the bit in
// every run and for every number of threads.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace fused_cnn {

constexpr int64_t kGrain = 1 << 15;
constexpr int64_t kCacheBytes = 4 << 20;  // a thread's share of the caches, for what lies between convolutions

// body(begin, end) over [begin, end): as many rows at a time as stay in the second-level cache while several branches,
// or several passes, work on them.
template <typename F>
void row_blocks(int64_t begin, int64_t end, int64_t channels, const F& body) {
  const int64_t block = std::max<int64_t>(4, (int64_t{1} << 16) / std::max<int64_t>(1, channels));
  for (int64_t row = begin; row < end; row += block) body(row, std::min(row + block, end));
}

template <typename F>
void parallel_row_blocks(int64_t rows, int64_t channels, const F& body) {
  if (rows * channels == 0) return;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / channels),
                              [&](int64_t begin, int64_t end) { row_blocks(begin, end, channels, body); });
}

// `rows` rows of `channels` elements in at most 64 tasks. A task's partial sums cost as much as a row, so it
// gets 32 rows or more.
struct RowTasks {
  int64_t rows, channels, count;

  RowTasks(int64_t rows, int64_t channels)
      : rows(rows),
        channels(channels),
        count(std::max<int64_t>(1, std::min({rows * channels / (kGrain / 2), rows / 32, int64_t{64}}))) {}
  int64_t begin(int64_t task) const { return rows * task / count; }
  int64_t size(int64_t task) const { return begin(task + 1) - begin(task); }

  template <typename F>
  void run(const F& body) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) body(task);
    });
  }

  // Every task's `bytes` of sums, zero at first: body(begin, end, sums) adds those of a block of the task's rows.
  template <typename F>
  std::unique_ptr<char[]> partial_sums(int64_t bytes, const F& body) const {
    auto partial = std::make_unique_for_overwrite<char[]>(count * bytes);
    run([&](int64_t task) {
      char* sums = partial.get() + task * bytes;
      std::memset(sums, 0, bytes);
      row_blocks(begin(task), begin(task + 1), channels, [&](int64_t first, int64_t last) { body(first, last, sums); });
    });
    return partial;
  }
};

// Uninitialised memory that grows as it is asked for more, and is kept until its owner, a thread or a call, ends.
class Workspace {
 public:
  void* at_least(int64_t bytes);

 private:
  std::unique_ptr<void, void (*)(void*)> data_{nullptr, std::free};
  int64_t bytes_ = 0;
};

// A call's scratch memory: what its thread keeps from call to call, which is mapped and perhaps in cache, or memory of
// its own where it needs more than a thread should keep.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  void* data() const { return data_; }

 private:
  Workspace own_;
  void* data_;
};

}  // namespace fused_cnn
