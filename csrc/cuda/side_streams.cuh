// Launches beside others while a CUDA graph is captured: on streams that fork off PyTorch's current one and are joined
// to it again, so that the graph's kernels may run at the same time. Outside of a capture they are launched in line:
// there the host, to which forking and joining are calls, too, is the limit before kernels are.
//
// What is allocated on a side stream goes back to that stream, so that no other may get it too early; what a side
// stream uses of the current one's must live until the join.
#pragma once
#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <vector>
#include "cuda/launch.cuh"

namespace fused_cnn {

class SideStreams {
 public:
  // For launches on a device; `wanted` says whether they may run at the same time.
  SideStreams(int device, bool wanted) : guard_(device), device_(device), main_(current_stream(device)) {
    if (wanted) capture_ = capture_of(main_);
  }
  SideStreams(const SideStreams&) = delete;
  ~SideStreams() {
    for (const cudaStream_t side : used_) {
      try {
        wait(main_, side);  // of what ended in an error: a capture with streams that were not joined cannot end
      } catch (const std::exception&) {
      }
      give_back(side);
    }
  }

  // work()'s launches come behind what was launched on the current stream before, and beside what comes after.
  template <typename Work>
  void beside(const Work& work) {
    if (!capture_) return work();
    const cudaStream_t side = take();
    used_.push_back(side);
    wait(side, main_);
    const CurrentStream current(device_, side);
    work();
  }

  // What is launched from now on comes behind all of it.
  void join() {
    for (; !used_.empty(); used_.pop_back()) {
      wait(main_, used_.back());
      give_back(used_.back());
    }
  }

 private:
  // The number of the capture that a stream is in; none, too, where CUDA does not say, as of the default stream while
  // one that blocks with it is captured.
  static std::optional<unsigned long long> capture_of(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long number = 0;
    if (cudaStreamGetCaptureInfo(stream, &status, &number) != cudaSuccess) cudaGetLastError();  // as check() does
    return status == cudaStreamCaptureStatusNone ? std::nullopt : std::optional(number);
  }

  // A stream that no other capture has: it stays in one until that ends, not until the join. The last to come back goes
  // out first, so that a capture's forks share few. None is ever destroyed: PyTorch's allocator keeps memory by stream.
  cudaStream_t take() const {
    const std::lock_guard lock(mutex_);
    std::vector<cudaStream_t>& idle = idle_[device_];
    const auto found = std::find_if(idle.rbegin(), idle.rend(), [&](cudaStream_t stream) {
      const auto its = capture_of(stream);
      return !its || its == capture_;
    });
    if (found != idle.rend()) {
      const cudaStream_t stream = *found;
      idle.erase(std::next(found).base());
      return stream;
    }
    // A capture forbids this thread what may wait for the device, unless it says that it knows better.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaStream_t made = nullptr;
    const cudaError_t error = cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
    cudaThreadExchangeStreamCaptureMode(&mode);
    check(error);
    return made;
  }
  void give_back(cudaStream_t stream) const {
    const std::lock_guard lock(mutex_);
    idle_[device_].push_back(stream);
  }

  // What comes on `later` from now on waits for what is on `earlier`.
  static void wait(cudaStream_t later, cudaStream_t earlier) {
    cudaEvent_t event;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    cudaError_t error = cudaEventRecord(event, earlier);
    if (error == cudaSuccess) error = cudaStreamWaitEvent(later, event, 0);
    cudaEventDestroy(event);
    check(error);
  }

  static void check(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();  // or this library's next check would report it once more
    FUSED_CNN_CHECK(error == cudaSuccess, "streams beside the current one: ", cudaGetErrorString(error));
  }

  static inline std::mutex mutex_;
  static inline std::map<int, std::vector<cudaStream_t>> idle_;  // by device

  torch::stable::accelerator::DeviceGuard guard_;
  int device_;
  cudaStream_t main_;
  std::optional<unsigned long long> capture_;  // where work forks off
  std::vector<cudaStream_t> used_;
};

}  // namespace fused_cnn
