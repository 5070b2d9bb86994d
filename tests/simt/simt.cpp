// The machine behind cuda_runtime.h: fibres, a table of the memory that kernels may touch, and the streams' order.
// While install() is in force, PyTorch's CPU tensors come from an allocator that enters each one in the table, to the
// byte, and fills it with NaN. This file is compiled without instrumentation.
#include "cuda_runtime.h"
#include <c10/core/CPUAllocator.h>
#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <ucontext.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

dim3 gridDim, blockDim, blockIdx, threadIdx;
extern "C" int simt_late;
int simt_late = simt::kCopies;
cudaStream_t simt::current_stream = nullptr;

namespace {

struct Region {
  uintptr_t begin, end;
  bool holds(uintptr_t at, size_t bytes) const { return begin <= at && at + bytes <= end; }
};

std::mutex mutex;
std::map<uintptr_t, uintptr_t> tensors;  // begin -> end
Region recent[4];                        // of the tensors, until the launch ends: a kernel reads few by turns
size_t oldest;
std::vector<Region> ours;  // this library's own data: __shared__ arrays, constants

// A fibre runs one thread of every block. It is entered by setcontext() once and from then on by _longjmp(), which,
// unlike swapcontext(), asks nothing of the kernel.
constexpr size_t kStack = 64 << 10;
struct Fibre {
  ucontext_t start;
  jmp_buf place;
  std::vector<char> stack = std::vector<char>(kStack);
  bool started = false, done = true;
  int arrived_in = 0;  // the turn of the cluster's barrier
};
std::vector<Fibre> fibres;
jmp_buf scheduler;
size_t current;
bool running;    // inside a kernel
size_t arrived;  // threads at the cluster's barrier
int turns_of_cluster;
bool has_shared[simt::kMostCluster];  // blocks of the cluster that runs
void (*body)(const void*);
const void* body_arguments;
uintptr_t launcher;  // an address on the launching thread's stack, where the arguments are
std::string error;

struct Work {
  void (*run)(const void*);
  std::vector<char> arguments;
};
std::vector<std::deque<std::vector<Work>>> at_work;  // groups of each thread, the open one last
bool some_late;                                      // one of them may have work

// Of kernels alone: what PyTorch's operators read and write in a capture is not seen.
// A stream's clock has for each stream how many of its launches come before what this one does next: a launch ticks its
// own, and waiting for an event takes the later of both.
constexpr size_t kStreams = 8;
struct Clock {
  unsigned of[kStreams] = {};
};
struct Byte {
  size_t writer = 0;  // the stream
  unsigned written = 0;
  Clock read;
};
Clock clocks[kStreams];
size_t streams = 1;
std::map<uintptr_t, Byte> bytes_touched;   // since the capture began
std::map<uintptr_t, size_t> allocated_on;  // the stream on which memory was asked for, by where it begins
std::string wrong_in_capture;
bool capturing;
unsigned long long captures, entered[kStreams];  // their number, and each side stream's while it lasts
int waits;                                       // for events

size_t number_of(cudaStream_t stream) {
  return reinterpret_cast<size_t>(stream);
}

bool is_before(const Byte& byte, const Clock& now, bool reads_too) {
  bool ordered = byte.written <= now.of[byte.writer];
  for (size_t s = 0; s < kStreams && reads_too; ++s) ordered &= byte.read.of[s] <= now.of[s];
  return ordered;
}

// Whether an access by a launch on the current stream is ordered behind all that it must follow.
bool in_order(uintptr_t at, size_t bytes, bool writes) {
  const size_t stream = number_of(simt::current_stream);
  const Clock& now = clocks[stream];
  bool ordered = true;
  for (uintptr_t place = at; place < at + bytes; ++place) {
    Byte& byte = bytes_touched[place];
    ordered &= is_before(byte, now, writes);
    if (writes) {
      byte.writer = stream;
      byte.written = now.of[stream];
    } else {
      byte.read.of[stream] = now.of[stream];
    }
  }
  return ordered;
}

// PyTorch gives memory that is freed to the next who asks on the stream on which it was asked for, at once.
void note_freed(uintptr_t begin, uintptr_t end) {
  const Clock& now = clocks[allocated_on[begin]];
  const auto first = bytes_touched.lower_bound(begin), last = bytes_touched.lower_bound(end);
  for (auto byte = first; byte != last; ++byte) {
    if (!is_before(byte->second, now, /*reads_too=*/true))
      wrong_in_capture = "memory is freed that a stream still uses";
  }
  bytes_touched.erase(first, last);
}

void yield() {
  if (_setjmp(fibres[current].place) == 0) _longjmp(scheduler, 1);
}

void enter() {
  for (;;) {
    body(body_arguments);
    fibres[current].done = true;
    yield();
  }
}

void resume(Fibre& fibre) {
  if (_setjmp(scheduler) != 0) return;
  if (fibre.started) _longjmp(fibre.place, 1);
  fibre.started = true;
  getcontext(&fibre.start);
  fibre.start.uc_stack.ss_sp = fibre.stack.data();
  fibre.start.uc_stack.ss_size = kStack;
  makecontext(&fibre.start, enter, 0);
  setcontext(&fibre.start);
}

bool allowed(uintptr_t at, size_t bytes) {
  for (const Region& region : recent) {
    if (region.holds(at, bytes)) return true;
  }
  const auto stack = reinterpret_cast<uintptr_t>(fibres[current].stack.data());
  if (Region{stack, stack + kStack}.holds(at, bytes)) return true;
  if (Region{launcher - (64 << 10), launcher + (64 << 10)}.holds(at, bytes)) return true;
  for (const Region& region : ours) {
    if (region.holds(at, bytes)) return true;
  }
  const std::lock_guard lock(mutex);
  const auto next = tensors.upper_bound(at);
  if (next == tensors.begin()) return false;
  const Region found{std::prev(next)->first, std::prev(next)->second};
  if (!found.holds(at, bytes)) return false;
  recent[oldest++ % std::size(recent)] = found;
  return true;
}

// Ends the kernel: the access does not happen.
[[noreturn]] void refuse(const char* what, size_t bytes, const char* wrong) {
  if (error.empty()) {
    char text[160];
    std::snprintf(text, sizeof text, "%s of %zu bytes %s, block (%u, %u), thread %u", what, bytes, wrong, blockIdx.x,
                  blockIdx.y, threadIdx.x);
    error = text;
  }
  running = false;
  _longjmp(scheduler, 1);
}

bool is_of_tensor(uintptr_t at, size_t bytes) {
  const std::lock_guard lock(mutex);
  const auto next = tensors.upper_bound(at);
  return next != tensors.begin() && Region{std::prev(next)->first, std::prev(next)->second}.holds(at, bytes);
}

void check(const char* what, const void* at, size_t bytes, bool writes) {
  if (!running) return;
  const auto place = reinterpret_cast<uintptr_t>(at);
  if (!allowed(place, bytes)) refuse(what, bytes, "outside of every tensor");
  if (capturing && is_of_tensor(place, bytes) && !in_order(place, bytes, writes)) {
    refuse(what, bytes, "beside another stream's access");
  }
}

int note_data(dl_phdr_info* info, size_t, void* inside) {
  std::vector<Region> found;
  bool this_library = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & part = info->dlpi_phdr[i];
    if (part.p_type != PT_LOAD) continue;
    const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
    found.push_back({begin, begin + part.p_memsz});
    this_library |= found.back().holds(reinterpret_cast<uintptr_t>(inside), 1);
  }
  if (this_library) ours = found;
  return this_library;
}

void forget(void* memory) {
  {
    const std::lock_guard lock(mutex);
    const auto found = tensors.find(reinterpret_cast<uintptr_t>(memory));
    if (capturing) note_freed(found->first, found->second);
    tensors.erase(found);
  }
  std::free(memory);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = std::aligned_alloc(64, (bytes + 127) / 64 * 64);  // an empty tensor has an address, too
    std::memset(memory, 0xff, bytes);
    const std::lock_guard lock(mutex);
    const auto begin = reinterpret_cast<uintptr_t>(memory);
    tensors[begin] = begin + bytes;
    allocated_on[begin] = number_of(simt::current_stream);
    return {memory, memory, &forget, c10::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &forget; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

namespace simt {

void barrier() {
  yield();
}

// Blocks of a cluster need not have come by the same number of barriers. All threads leave it in the same turn.
void cluster_arrive() {
  ++arrived;
  fibres[current].arrived_in = turns_of_cluster;
}
void cluster_wait() {
  while (turns_of_cluster == fibres[current].arrived_in) yield();
}

unsigned char* shared_of_block(unsigned char* of_all) {
  unsigned char* const found = of_all + cluster_rank() * kMostShared;
  if (!has_shared[cluster_rank()]) std::memset(found, 0xff, kMostShared);
  has_shared[cluster_rank()] = true;
  return found;
}

unsigned cluster_rank() {
  return static_cast<unsigned>(current / blockDim.x);
}

// Every thread of the block calls this the same number of times, as the next.
void exchange(const void* mine, size_t bytes, void* all) {
  constexpr size_t kLanes = 32;
  static std::vector<char> of_thread;
  of_thread.resize(std::max(of_thread.size(), (blockDim.x + kLanes) * bytes));
  std::memcpy(&of_thread[current * bytes], mine, bytes);
  barrier();
  std::memcpy(all, &of_thread[current / kLanes * kLanes * bytes], kLanes * bytes);
  barrier();
}

float shuffle_xor(float value, int lanes) {
  static std::vector<float> of_thread;
  of_thread.resize(std::max<size_t>(of_thread.size(), blockDim.x));
  of_thread[current] = value;
  barrier();
  const float other = of_thread[current ^ lanes];
  barrier();
  return other;
}

void later(int kind, void (*work)(const void*), const void* arguments, size_t bytes) {
  if (kind != simt_late) return work(arguments);
  some_late = true;
  std::vector<Work>& group = at_work[current].back();
  const char* const from = static_cast<const char*>(arguments);
  group.push_back({work, {from, from + bytes}});
}

void end_group(int kind) {
  if (kind != simt_late) return;
  some_late = true;
  at_work[current].emplace_back();
}

void finish(int kind, int running) {
  if (kind != simt_late) return;
  while (at_work[current].size() > static_cast<size_t>(running) + 1) {  // the open group is the last
    const std::vector<Work> group = std::move(at_work[current].front());
    at_work[current].pop_front();
    for (const Work& work : group) {
      alignas(16) char arguments[128];  // where a kernel may read
      std::memcpy(arguments, work.arguments.data(), work.arguments.size());
      work.run(arguments);
    }
  }
}

float dot(const float* a, const float* b, float sum) {
  for (int i = 0; i < 16; ++i) sum += a[i] * b[i];
  return sum;
}

const char* last_error() {
  return error.c_str();
}

cudaError_t launch(const cudaLaunchConfig_t& config, void (*thread)(const void*), const void* arguments) {
  if (ours.empty()) dl_iterate_phdr(note_data, &error);
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  body = thread;
  body_arguments = arguments;
  ++clocks[number_of(current_stream)].of[number_of(current_stream)];
  launcher = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  error.clear();
  arrived = 0;
  std::fill(std::begin(recent), std::end(recent), Region{});
  const unsigned cluster = config.numAttrs > 0 ? config.attrs->val.clusterDim.x : 1;
  if (cluster > kMostCluster || gridDim.x % cluster != 0) std::abort();
  const size_t threads = cluster * blockDim.x;
  if (fibres.size() < threads) fibres.resize(threads);
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (unsigned first = 0; first < gridDim.x; first += cluster) {
        for (size_t t = 0; t < threads; ++t) fibres[t].done = false;
        if (at_work.size() < threads || some_late) at_work.assign(threads, std::deque<std::vector<Work>>(1));
        some_late = false;
        std::fill(std::begin(has_shared), std::end(has_shared), false);
        for (bool some = true; some;) {  // a turn takes every thread to its next barrier or its end
          some = false;
          for (size_t turn = 0; turn < threads; ++turn) {
            current = (first / cluster + blockIdx.y) % 2 == 0 ? turn : threads - 1 - turn;
            if (fibres[current].done) continue;
            some = true;
            threadIdx.x = static_cast<unsigned>(current % blockDim.x);
            blockIdx.x = first + cluster_rank();
            running = true;
            resume(fibres[current]);
            running = false;
            if (!error.empty()) {
              fibres.clear();  // which are in the middle of this launch
              return cudaErrorIllegalAddress;
            }
          }
          if (arrived == threads) {
            arrived = 0;
            ++turns_of_cluster;
          }
        }
      }
    }
  }
  return cudaSuccess;
}

}  // namespace simt

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  if (streams == kStreams) return cudaErrorInvalidValue;
  *stream = reinterpret_cast<cudaStream_t>(streams++);
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* number) {
  // A side stream is in the capture in which something was launched on it, or waited for.
  const size_t i = number_of(stream);
  const bool in_one = i == 0 ? capturing : entered[i] != 0;
  *status = in_one ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  *number = i == 0 ? captures : entered[i];
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new Clock;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  *static_cast<Clock*>(event) = clocks[number_of(stream)];
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  ++waits;
  if (capturing) entered[number_of(stream)] = captures;
  Clock& clock = clocks[number_of(stream)];
  for (size_t s = 0; s < kStreams; ++s) clock.of[s] = std::max(clock.of[s], static_cast<Clock*>(event)->of[s]);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete static_cast<Clock*>(event);
  return cudaSuccess;
}

// What -fsanitize=kernel-address calls before each access.
extern "C" {
#define SIMT_SIZED(bytes)                              \
  void __asan_load##bytes##_noabort(const void* at) {  \
    check("read", at, bytes, /*writes=*/false);        \
  }                                                    \
  void __asan_store##bytes##_noabort(const void* at) { \
    check("write", at, bytes, /*writes=*/true);        \
  }
SIMT_SIZED(1)
SIMT_SIZED(2)
SIMT_SIZED(4)
SIMT_SIZED(8)
SIMT_SIZED(16)
void __asan_loadN_noabort(const void* at, size_t bytes) {
  check("read", at, bytes, /*writes=*/false);
}
void __asan_storeN_noabort(const void* at, size_t bytes) {
  check("write", at, bytes, /*writes=*/true);
}
void __asan_handle_no_return() {}

// Called where an address is no multiple of its type's alignment, which is how a GPU must be given it. The description
// begins with the place in the source and goes on with the type and the alignment's logarithm.
void __ubsan_handle_type_mismatch_v1(const void* description, const void*) {
  const char* const after_type = static_cast<const char*>(description) + 16 + sizeof(void*);
  if (running) refuse("access on a multiple", size_t{1} << *after_type, "at another address");
}

// PyTorch's function, behind a look at the tensors that a kernel's host code hands to cuDNN, which was seen to read
// what does not lie on 16 bytes as if it did.
__attribute__((visibility("default"))) int32_t torch_call_dispatcher(const char* name, const char* overload,
                                                                     uint64_t* stack, uint64_t version) {
  using Call = int32_t (*)(const char*, const char*, uint64_t*, uint64_t);
  static const Call call = reinterpret_cast<Call>(dlsym(RTLD_NEXT, "torch_call_dispatcher"));
  const std::string op = name;
  const int given = op == "aten::convolution" ? 2 : op == "aten::convolution_backward" ? 3 : op == "aten::max_pool2d";
  for (int i = 0; i < given; ++i) {
    void* data = nullptr;
    aoti_torch_get_data_ptr(reinterpret_cast<AtenTensorHandle>(stack[i]), &data);
    if (reinterpret_cast<uintptr_t>(data) % 16 != 0) {
      std::fprintf(stderr, "%s was given a tensor %d that does not lie on 16 bytes\n", name, i);
      return 1;
    }
  }
  return call(name, overload, stack, version);
}

void __asan_before_dynamic_init(const char*) {}
void __asan_after_dynamic_init() {}

// From now on streams are captured; or (on = false) what was wrong in the capture that ends, "" where nothing was.
__attribute__((visibility("default"))) const char* simt_capture(bool on) {
  static std::string found;
  found = std::exchange(wrong_in_capture, {});
  for (size_t s = 1; s < streams && !on; ++s) {
    if (clocks[s].of[s] > clocks[0].of[s]) found += " a stream was not joined";
  }
  capturing = on;
  captures += on;
  std::fill(std::begin(entered), std::end(entered), 0);
  bytes_touched.clear();
  std::fill(std::begin(clocks), std::end(clocks), Clock{});
  return found.c_str();
}
// How often work was forked off and joined since the last question.
__attribute__((visibility("default"))) int simt_forks() {
  return std::exchange(waits, 0) / 2;
}
// How many streams there are, the current one included.
__attribute__((visibility("default"))) size_t simt_streams() {
  return streams;
}

__attribute__((visibility("default"))) void simt_install(bool on) {
  static Allocator allocator;
  static c10::Allocator* const before = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &allocator : before);
}
}
