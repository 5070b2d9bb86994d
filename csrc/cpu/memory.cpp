// Memory for the results and the scratch of the CPU's kernels. Results are PyTorch's own tensors. The C library gives
// large blocks back to the system when they are freed, and the next call pays for fresh pages: up to a tenth of
// ResNet-50's time at batch 16. So the first large result tells it to keep them, and large results lie in huge pages
// where the system has these.
#include <sys/mman.h>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include "cpu/parallel.h"
#include "shared/rows.h"
#ifdef __GLIBC__
#include <malloc.h>
#include <unistd.h>
#endif

namespace fused_cnn {
namespace {

constexpr int64_t kLarge = int64_t{1} << 20;  // bytes
constexpr uintptr_t kHugePage = uintptr_t{1} << 21;

// Whoever sets malloc's own variables has chosen how it works.
void keep_freed_memory() {
#ifdef __GLIBC__
  static std::atomic<bool> done;  // no lock, which a child that is forked now would find taken for ever
  if (done.load(std::memory_order_relaxed) || done.exchange(true)) return;
  for (char** variable = environ; variable != nullptr && *variable != nullptr; ++variable) {
    if (std::strncmp(*variable, "MALLOC_", 7) == 0 || std::strncmp(*variable, "GLIBC_TUNABLES=", 15) == 0) return;
  }
  mallopt(M_MMAP_THRESHOLD, 1 << 25);  // the most that it takes
  mallopt(M_TRIM_THRESHOLD, 1 << 27);
#endif
}

// Of those that lie within the memory as a whole: nothing beside it becomes larger.
void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE  // Linux
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

Tensor empty_result(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  const Tensor result = empty_nchw(like, channels, height, width, MemoryFormat::ChannelsLast);
  const int64_t bytes = result.numel() * result.element_size();
  if (bytes >= kLarge) {
    keep_freed_memory();
    use_huge_pages(result.data_ptr(), bytes);
  }
  return result;
}

void* Workspace::at_least(int64_t bytes) {
  constexpr int64_t kPage = 4096;
  if (bytes > bytes_) {
    bytes_ = 0;
    data_.reset();  // first, so that both need not be there at once
    data_.reset(std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage));
    FUSED_CNN_CHECK(data_ != nullptr, "out of memory: ", bytes, " bytes of scratch memory");
    bytes_ = bytes;
    if (bytes >= kLarge) use_huge_pages(data_.get(), bytes);
  }
  return data_.get();
}

Scratch::Scratch(int64_t bytes) {
  thread_local Workspace kept;
  data_ = (bytes > torch::stable::get_num_threads() * kCacheBytes ? own_ : kept).at_least(bytes);
}

}  // namespace fused_cnn
