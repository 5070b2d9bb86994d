// Memory for the results of the CPU's kernels, empty_result(). The C library gives large blocks back to the system when
// they are freed, and the next call pays for fresh pages: a tenth of ResNet-50's time at batch 8. So large results come
// from a pool that keeps what was freed, up to kKept bytes, for the next result of that size. Such memory returns to
// the pool with its last reference, and cannot grow: resize_() raises on it, as on every tensor over memory that
// PyTorch did not allocate. torch_from_blob, which takes a deleter, is in PyTorch's stable interface from 2.11 on, and
// is looked up at run time: with 2.10 every result is an ordinary tensor.
#include <dlfcn.h>
#include <sys/mman.h>
#include <cstdlib>
#include <mutex>
#include <vector>
#include "cpu/parallel.h"
#include "shared/rows.h"

namespace fused_cnn {
namespace {

constexpr int64_t kHugePage = int64_t{1} << 21;
constexpr int64_t kSmallest = int64_t{1} << 20, kLargest = int64_t{1} << 26;  // bytes of a pooled result
constexpr int64_t kKept = int64_t{1} << 27;                                   // bytes of freed memory, at most

using FromBlob = AOTITorchError (*)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t,
                                    AtenTensorHandle*, int32_t, const uint8_t*, int64_t, void (*)(void*, void*), void*);

FromBlob from_blob() {
  static const auto found = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  return found;
}

struct Block {
  void* data;
  int64_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> free;  // the latest freed last
  int64_t kept = 0;
};
Pool& pool = *new Pool;  // never destroyed: a tensor may outlive every other static

// At least `bytes`, and less than twice as many; null where the system has no memory.
Block take(int64_t bytes) {
  const int64_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  {
    const std::lock_guard lock(pool.mutex);
    auto best = pool.free.end();
    for (auto it = pool.free.begin(); it != pool.free.end(); ++it) {
      if (it->bytes >= bytes && it->bytes < 2 * rounded && (best == pool.free.end() || it->bytes <= best->bytes))
        best = it;
    }
    if (best != pool.free.end()) {
      const Block found = *best;
      pool.kept -= found.bytes;
      pool.free.erase(best);
      return found;
    }
  }
  void* data = std::aligned_alloc(kHugePage, rounded);
#ifdef MADV_HUGEPAGE  // Linux
  if (data != nullptr) madvise(data, rounded, MADV_HUGEPAGE);
#endif
  return {data, rounded};
}

void give(Block block) {
  const std::lock_guard lock(pool.mutex);
  pool.free.push_back(block);
  pool.kept += block.bytes;
  while (pool.kept > kKept) {  // the longest unused goes first
    pool.kept -= pool.free.front().bytes;
    std::free(pool.free.front().data);
    pool.free.erase(pool.free.begin());
  }
}

}  // namespace

Tensor empty_result(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  const int64_t bytes = like.size(0) * channels * height * width * like.element_size();
  if (bytes < kSmallest || bytes > kLargest || from_blob() == nullptr)
    return empty_nchw(like, channels, height, width, MemoryFormat::ChannelsLast);
  const Block block = take(bytes);
  FUSED_CNN_CHECK(block.data != nullptr, "out of memory: ", bytes, " bytes for a result");
  const int64_t sizes[] = {like.size(0), channels, height, width};
  const int64_t strides[] = {height * width * channels, 1, width * channels, channels};
  const auto code = [](auto value) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(value)); };
  const auto give_back = [](void* data, void* size) { give({data, reinterpret_cast<intptr_t>(size)}); };
  AtenTensorHandle handle;
  const AOTITorchError failed = from_blob()(
      block.data, 4, sizes, strides, 0, code(like.scalar_type()), code(like.device().type()), like.device().index(),
      &handle, code(torch::headeronly::Layout::Strided), nullptr, 0, give_back, reinterpret_cast<void*>(block.bytes));
  FUSED_CNN_CHECK(failed == 0, "a result of ", bytes, " bytes could not be made a tensor");
  return Tensor(handle);
}

void* Workspace::at_least(int64_t bytes) {
  constexpr int64_t kPage = 4096;
  if (bytes > bytes_) {
    bytes_ = 0;
    data_.reset();  // first, so that both need not be there at once
    data_.reset(std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage));
    FUSED_CNN_CHECK(data_ != nullptr, "out of memory: ", bytes, " bytes of scratch memory");
    bytes_ = bytes;
  }
  return data_.get();
}

}  // namespace fused_cnn
