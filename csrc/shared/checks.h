// Guards that every registered op runs before it touches a pointer, and the one layout rule: results are channels_last
// where the first input's channels are adjacent in memory (stride 1, more than one channel), else contiguous NCHW;
// Python's fake kernels follow the same rule (fused_cnn/_layout.py). Messages state what was expected and what came.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>
#include <algorithm>
#include <array>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include "shared/dtype.h"

namespace fused_cnn {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Args>
[[noreturn]] inline void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::runtime_error(message.str());
}

#define FUSED_CNN_CHECK(condition, ...)               \
  do {                                                \
    if (!(condition)) ::fused_cnn::fail(__VA_ARGS__); \
  } while (false)

// PyTorch has it from 2.13 on; before, a failed call's message goes to standard error alone.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

// Calls one of PyTorch's operators through its dispatcher. Of what it returns, the first are the operator's results.
template <typename... Arguments>
std::array<StableIValue, sizeof...(Arguments)> call_operator(const char* name, const char* overload,
                                                             const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  if (torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) == TORCH_SUCCESS) return stack;
  fail(name, ": ",
       torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace()
                                                  : "failed, and PyTorch's message is on standard error");
}

// What m.impl() is given for a kernel: TORCH_BOX's function, whose errors PyTorch throws itself, so that they become
// Python's whatever compiler and C++ library this one was built with.
template <void (*boxed)(StableIValue*, uint64_t, uint64_t)>
void throwing_as_pytorch(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  std::string message;
  try {
    return boxed(stack, inputs, outputs);
  } catch (const std::exception& error) {
    message = error.what();
  }
  aoti_torch_check(false, "fused_cnn", "a kernel", 0, message.c_str());
}

#define FUSED_CNN_BOX(function) &::fused_cnn::throwing_as_pytorch<TORCH_BOX(function)>

inline std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << "(";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << ")";
  return out.str();
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      fail(op, ": ", name, " must be float64, float32, float16 or bfloat16, got ",
           torch::headeronly::toString(t.scalar_type()));
  }
}

inline void check_4d(const char* op, const char* name, const Tensor& t) {
  FUSED_CNN_CHECK(t.dim() == 4, op, ": ", name, " must have 4 dimensions (N, C, H, W), got ", shape_of(t));
}

// b has a's device and dtype (and, with same_shape, its shape).
inline void check_like(const char* op, const char* name_a, const Tensor& a, const char* name_b, const Tensor& b,
                       bool same_shape = true) {
  FUSED_CNN_CHECK(a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index(), op, ": ", name_b,
                  " must be on the device of ", name_a);
  FUSED_CNN_CHECK(a.scalar_type() == b.scalar_type(), op, ": ", name_b, " must have the dtype of ", name_a, ", ",
                  torch::headeronly::toString(a.scalar_type()), ", got ", torch::headeronly::toString(b.scalar_type()));
  if (same_shape) {
    bool same = a.dim() == b.dim();
    for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
    FUSED_CNN_CHECK(same, op, ": ", name_b, " must have the shape of ", name_a, ", ", shape_of(a), ", got ",
                    shape_of(b));
  }
}

// t has the shape of x's result, (N, channels, height, width), and x's device and dtype.
inline void check_result_shape(const char* op, const char* name, const Tensor& t, const Tensor& x, int64_t channels,
                               int64_t height, int64_t width) {
  check_4d(op, name, t);
  check_like(op, "x", x, name, t, /*same_shape=*/false);
  FUSED_CNN_CHECK(t.size(0) == x.size(0) && t.size(1) == channels && t.size(2) == height && t.size(3) == width, op,
                  ": ", name, " must have the result's shape (", x.size(0), ", ", channels, ", ", height, ", ", width,
                  "), got ", shape_of(t));
}

// A per-channel vector of `channels` elements of the given type.
inline void check_channels(const char* op, const char* name, const Tensor& t, int64_t channels) {
  FUSED_CNN_CHECK(t.dim() == 1 && t.size(0) == channels, op, ": ", name, " must have shape (", channels, "), got ",
                  shape_of(t));
}

inline MemoryFormat result_format(const Tensor& x) {
  return x.stride(1) == 1 && x.size(1) > 1 ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// Whether a dense tensor of these sizes, of which 0 counts as 1, could be in memory: it has at most 2^47 elements. What
// kernels compute of such sizes does not overflow.
inline bool addressable(std::initializer_list<int64_t> sizes) {
  int64_t left = int64_t{1} << 47;
  for (const int64_t size : sizes) left /= std::max<int64_t>(1, size);
  return left > 0;
}

// Whether a tensor of 4 dimensions lies in memory as this format has it.
inline bool is_dense(const Tensor& t, MemoryFormat format) {
  int64_t expected = 1;
  for (const int dim : format == MemoryFormat::ChannelsLast ? std::array{1, 3, 2, 0} : std::array{3, 2, 1, 0}) {
    const int64_t size = t.size(dim);
    if (size != 1 && t.stride(dim) != expected) return false;
    expected *= size;
  }
  return true;
}

// Asked first: PyTorch's own answer comes through its dispatcher.
inline Tensor dense(const Tensor& t, MemoryFormat format) {
  return t.dim() == 4 && t.numel() > 0 && is_dense(t, format) ? t : torch::stable::contiguous(t, format);
}

inline Tensor dense_vector(const Tensor& t) {
  return t.numel() <= 1 || t.stride(0) == 1 ? t : torch::stable::contiguous(t);
}

inline Tensor empty_nchw(const Tensor& like, int64_t channels, int64_t height, int64_t width, MemoryFormat format) {
  const int64_t sizes[] = {like.size(0), channels, height, width};
  if (!like.is_cuda() || std::find(std::begin(sizes), std::end(sizes), 0) != std::end(sizes)) {
    return torch::stable::empty(sizes, like.scalar_type(), torch::headeronly::Layout::Strided, like.device(),
                                std::nullopt, format);
  }
  // A GPU waits for the host where layers are small, and this takes a quarter of that call's time.
  const bool last = format == MemoryFormat::ChannelsLast;
  const int64_t pixels = height * width, pixel = last ? channels : 1;
  const int64_t strides[] = {pixels * channels, last ? 1 : pixels, width * pixel, pixel};
  using torch::stable::detail::from, torch::stable::detail::to;
  AtenTensorHandle made = nullptr;
  const auto error = aoti_torch_empty_strided(4, sizes, strides, to<int32_t>(from(like.scalar_type())),
                                              aoti_torch_device_type_cuda(), like.get_device_index(), &made);
  FUSED_CNN_CHECK(error == 0, "a result of shape (", sizes[0], ", ", channels, ", ", height, ", ", width,
                  ") cannot be allocated: ",
                  torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace()
                                                             : "PyTorch's message is on standard error");
  return Tensor(made);
}

template <typename T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline Tensor empty_like_4d(const Tensor& like, MemoryFormat format) {
  return empty_nchw(like, like.size(1), like.size(2), like.size(3), format);
}

}  // namespace fused_cnn
