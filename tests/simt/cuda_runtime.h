// A stand-in for CUDA's runtime header under which the host compiler takes csrc/*/cuda.cu as it is: a launch runs every
// block on this processor, its threads as fibres that take turns at barriers (simt.cpp). Threads run in ascending order
// in even blocks and in descending order in odd ones, so that a missing barrier shows; a block's shared memory is what
// the block before left there. With -fsanitize=kernel-address the compiler announces every access, and one that lies
// outside every tensor ends the launch with an error that says where.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 gridDim, blockDim, blockIdx, threadIdx;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline void __stwb(uint4* to, uint4 value) {
  *to = value;
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorIllegalAddress };

// Streams, and what is known of their order: launches happen at once, but in a capture (simt_capture) an access ends
// the launch with an error where another stream's is not ordered before it.
using cudaStream_t = void*;
using cudaEvent_t = void*;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* number);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace simt {
extern cudaStream_t current_stream;

constexpr unsigned kMostCluster = 8;
constexpr size_t kMostShared = 227 << 10;  // bytes of a block

void barrier();
void cluster_arrive();
void cluster_wait();
unsigned cluster_rank();
// Where the running block's part of such memory is, filled with NaN when its first thread asks.
unsigned char* shared_of_block(unsigned char* of_all);
cudaError_t launch(const cudaLaunchConfig_t& config, void (*thread)(const void*), const void* arguments);
const char* last_error();

float shuffle_xor(float value, int lanes);
// Every lane's value of `bytes`, in order, into `all`.
void exchange(const void* mine, size_t bytes, void* all);

// What runs on beside its thread: `work` on so many bytes, in groups. It happens at once or, if it is of the kind that
// simt_late names, as late as it may: when the thread waits for all groups but the last `running`.
enum { kCopies, kProducts };
void later(int kind, void (*work)(const void*), const void* arguments, size_t bytes);
void end_group(int kind);
void finish(int kind, int running);

// sum + the product of 16 pairs.
float dot(const float* a, const float* b, float sum);
}  // namespace simt

inline float __shfl_xor_sync(unsigned, float value, int lanes) {
  return simt::shuffle_xor(value, lanes);
}
inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int lanes) {
  uint32_t all[32];
  simt::exchange(&value, sizeof(value), all);
  return all[threadIdx.x % 32 ^ lanes];
}

inline void __syncthreads() {
  simt::barrier();
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  constexpr int kValues[] = {4, 8, 164 << 10, 163 << 10};
  *value = kValues[attribute];
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) {
  return simt::last_error();
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const auto thread = [&] { kernel(static_cast<Parameters>(arguments)...); };
  return simt::launch(*config, [](const void* call) { (*static_cast<decltype(thread)*>(call))(); }, &thread);
}
