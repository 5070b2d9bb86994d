// Launches beside others while a CUDA graph is captured: on streams that fork off PyTorch's current one and are joined
// to it again, so that the graph's kernels may run at the same time. Outside of a capture they are launched in line:
// there the host, to which forking and joining are calls, too, is the limit before kernels are.
//
// What is allocated on a side stream goes back to that stream, so that no other may get it too early; what a side
// stream uses of the current one's must live until the join.
#pragma once
#include <map>
#include <mutex>
#include <vector>
#include "cuda/launch.cuh"

namespace fused_cnn {

// A device's streams that no capture has at this moment. None is ever destroyed: PyTorch's allocator keeps memory by
// stream. The last to come back goes out first, so that one capture's forks share few.
class StreamPool {
 public:
  static cudaStream_t take(int device);  // which is the current device
  static void give_back(int device, cudaStream_t stream);

 private:
  static inline std::mutex mutex_;
  static inline std::map<int, std::vector<cudaStream_t>> idle_;
};

class SideStreams {
 public:
  // For launches on a device; `wanted` says whether they may run at the same time.
  SideStreams(int device, bool wanted)
      : guard_(device), device_(device), main_(current_stream(device)), forks_(wanted && is_capturing()) {}
  SideStreams(const SideStreams&) = delete;
  ~SideStreams() {
    for (const cudaStream_t side : used_) {
      try {
        wait(main_, side);  // of what ended in an error: a capture with streams that were not joined cannot end
      } catch (const std::exception&) {
      }
      StreamPool::give_back(device_, side);
    }
  }

  // work()'s launches come behind what was launched on the current stream before, and beside what comes after.
  template <typename Work>
  void beside(const Work& work) {
    if (!forks_) return work();
    const cudaStream_t side = StreamPool::take(device_);
    used_.push_back(side);
    wait(side, main_);
    const CurrentStream current(device_, side);
    work();
  }

  // What is launched from now on comes behind all of it.
  void join() {
    for (; !used_.empty(); used_.pop_back()) {
      wait(main_, used_.back());
      StreamPool::give_back(device_, used_.back());
    }
  }

 private:
  // No, too, where CUDA does not say, as of the default stream while a stream that blocks with it is captured.
  bool is_capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (cudaStreamIsCapturing(main_, &status) == cudaSuccess) return status == cudaStreamCaptureStatusActive;
    cudaGetLastError();  // or this library's next check would report it once more
    return false;
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

  torch::stable::accelerator::DeviceGuard guard_;
  int device_;
  cudaStream_t main_;
  bool forks_;
  std::vector<cudaStream_t> used_;
};

inline cudaStream_t StreamPool::take(int device) {
  const std::lock_guard lock(mutex_);
  std::vector<cudaStream_t>& idle = idle_[device];
  if (idle.empty()) {
    // A capture forbids this thread what may wait for the device, unless it says that it knows better.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaStream_t made = nullptr;
    const cudaError_t error = cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
    cudaThreadExchangeStreamCaptureMode(&mode);
    FUSED_CNN_CHECK(error == cudaSuccess, "a stream cannot be made: ", cudaGetErrorString(error));
    idle.push_back(made);
  }
  const cudaStream_t stream = idle.back();
  idle.pop_back();
  return stream;
}

inline void StreamPool::give_back(int device, cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  idle_[device].push_back(stream);
}

}  // namespace fused_cnn
