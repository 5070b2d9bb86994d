// Activations as rows of adjacent channels: what every channels_last kernel reads and writes. A channels_last tensor,
// or a slice of the channels of one, is used in place; any other layout is copied once. Also the checks that lists of
// branches share.
#pragma once
#include <optional>
#include <vector>
#include "shared/branches.h"
#include "shared/checks.h"

namespace fused_cnn {

inline char* at(void* base, int64_t index, int64_t element_size) {
  return static_cast<char*>(base) + index * element_size;
}

// A tensor's rows, in its own memory or in a copy of it: `tensor` keeps it alive.
struct RowView : Rows {
  Tensor tensor;

  Rows from(int64_t channel) const { return {fused_cnn::at(data, channel, tensor.element_size()), pitch}; }
};

// The elements between rows; none where the channels are not adjacent, the rows not evenly spaced, or overlapping.
inline std::optional<int64_t> row_stride(const Tensor& t) {
  int64_t stride = t.size(1), rows = 1;
  for (const int dim : {3, 2, 0}) {
    if (t.size(dim) == 1) continue;
    if (rows == 1) stride = t.stride(dim);
    if (t.stride(dim) != rows * stride) return std::nullopt;
    rows *= t.size(dim);
  }
  if (stride < t.size(1) || (t.size(1) > 1 && t.stride(1) != 1)) return std::nullopt;
  return stride;
}

inline RowView rows_of(const Tensor& t) {
  const std::optional<int64_t> stride = t.numel() == 0 ? t.size(1) : row_stride(t);
  const Tensor tensor = stride ? t : dense(t, MemoryFormat::ChannelsLast);
  return {{tensor.data_ptr(), stride.value_or(t.size(1))}, tensor};
}
inline RowView rows_of(const std::optional<Tensor>& t) {
  return t ? rows_of(*t) : RowView{};
}

// An uninitialised channels-last tensor for like's images.
#ifdef USE_CUDA
inline Tensor empty_result(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  return empty_nchw(like, channels, height, width, MemoryFormat::ChannelsLast);
}
#else
Tensor empty_result(const Tensor& like, int64_t channels, int64_t height, int64_t width);  // cpu/memory.cpp
#endif

// An uninitialised result, (N, channels, H, W) as `like` or of another size, written in rows; finish() gives it the
// layout that callers see.
struct RowResult : RowView {
  MemoryFormat format;
  bool in_place;

  RowResult(const Tensor& like, int64_t channels, MemoryFormat format)
      : RowResult(like, channels, like.size(2), like.size(3), format) {}
  RowResult(const Tensor& like, int64_t channels, int64_t height, int64_t width, MemoryFormat format)
      : format(format),
        // With one channel or one pixel both layouts are the same bytes; the strides must still be the
        // format's own.
        in_place(format == MemoryFormat::ChannelsLast || channels == 1 || height * width == 1) {
    tensor = in_place && format == MemoryFormat::Contiguous ? empty_nchw(like, channels, height, width, format)
                                                            : empty_result(like, channels, height, width);
    data = tensor.data_ptr();
    pitch = channels;
  }
  Tensor finish() const { return in_place ? tensor : dense(tensor, format); }
};

inline std::vector<Tensor> finished(const std::vector<RowResult>& results) {
  std::vector<Tensor> tensors;
  for (const RowResult& result : results) tensors.push_back(result.finish());
  return tensors;
}

inline int64_t row_count(const Tensor& t) {
  return t.size(0) * t.size(2) * t.size(3);
}

inline Tensor empty_vector(const Tensor& like, int64_t size, ScalarType dtype) {
  const int64_t sizes[] = {size};
  return torch::stable::empty(sizes, dtype, torch::headeronly::Layout::Strided, like.device());
}

// The type of per-channel vectors: float32, or float64 where x is.
inline ScalarType vector_dtype(DType dtype) {
  return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

// A dense per-channel vector of the vector type on x's device.
inline Tensor checked_vector(const char* op, const char* name, const Tensor& v, int64_t channels, const Tensor& x,
                             ScalarType dtype) {
  check_channels(op, name, v, channels);
  FUSED_CNN_CHECK(v.scalar_type() == dtype, op, ": ", name, " must be ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(v.scalar_type()));
  FUSED_CNN_CHECK(v.is_cuda() == x.is_cuda() && v.get_device_index() == x.get_device_index(), op, ": ", name,
                  " must be on the device of the input");
  return torch::stable::contiguous(v);
}

// Branches to be concatenated: at least one, all (N, C_i, H, W) with the same N, H, W, dtype and device.
// Returns their channels' sum.
inline int64_t check_branches(const char* op, const std::vector<Tensor>& branches) {
  FUSED_CNN_CHECK(!branches.empty(), op, ": at least one branch is needed, got none");
  const Tensor& first = branches[0];
  int64_t channels = 0;
  for (size_t i = 0; i < branches.size(); ++i) {
    const Tensor& branch = branches[i];
    const std::string name = "branch " + std::to_string(i);
    check_4d(op, name.c_str(), branch);
    check_like(op, "branch 0", first, name.c_str(), branch, /*same_shape=*/false);
    for (const int dim : {0, 2, 3}) {
      FUSED_CNN_CHECK(branch.size(dim) == first.size(dim), op, ": ", name,
                      " must have branch 0's batch, height and width: ", shape_of(first), ", got ", shape_of(branch));
    }
    channels += branch.size(1);
  }
  return channels;
}

}  // namespace fused_cnn
