// Activations as rows of adjacent channels: what every channels_last kernel reads and writes. A channels_last tensor,
// or a slice of the channels of one, is used in place; any other layout is copied once. Also the checks that lists of
// branches share.
#pragma once
#include <memory>
#include <optional>
#include <vector>
#include "shared/checks.h"

namespace fused_cnn {

// Row r (one pixel) starts at data + r * stride elements. `tensor` keeps the memory alive.
struct RowView {
  Tensor tensor;
  void* data;
  int64_t stride;
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
  return {tensor, tensor.data_ptr(), stride.value_or(t.size(1))};
}

inline Tensor empty_rows(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  return empty_nchw(like, channels, height, width, MemoryFormat::ChannelsLast);
}

// An uninitialised result, (N, channels, H, W) as `like`, written in rows; finish() gives it the layout that
// callers see. `empty` allocates it.
struct RowResult {
  MemoryFormat format;
  bool in_place;
  Tensor tensor;
  void* data;

  RowResult(const Tensor& like, int64_t channels, MemoryFormat format,
            Tensor (*empty)(const Tensor&, int64_t, int64_t, int64_t) = empty_rows)
      : format(format),
        // With one channel or one pixel both layouts are the same bytes; the strides must still be the
        // format's own.
        in_place(format == MemoryFormat::ChannelsLast || channels == 1 || like.size(2) * like.size(3) == 1),
        tensor(in_place && format == MemoryFormat::Contiguous
                   ? empty_nchw(like, channels, like.size(2), like.size(3), format)
                   : empty(like, channels, like.size(2), like.size(3))),
        data(tensor.data_ptr()) {}
  Tensor finish() const { return in_place ? tensor : dense(tensor, format); }
};

inline int64_t row_count(const Tensor& t) {
  return t.size(0) * t.size(2) * t.size(3);
}

inline Tensor empty_vector(const Tensor& like, int64_t size, ScalarType dtype) {
  const int64_t sizes[] = {size};
  return torch::stable::empty(sizes, dtype, torch::headeronly::Layout::Strided, like.device());
}

// Memory for a call's own sums and vectors, uninitialised; cheaper than a tensor.
inline std::unique_ptr<char[]> scratch(int64_t bytes) {
  return std::make_unique_for_overwrite<char[]>(bytes);
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

// The gradient of a concatenation of branches with these channels, and its result where there is one. Returns the
// channels' sum.
inline int64_t check_concatenation(const char* op, const Tensor& grad_out, const std::optional<Tensor>& out,
                                   const std::vector<int64_t>& channels) {
  check_4d(op, "grad_out", grad_out);
  if (out) {
    check_4d(op, "out", *out);
    check_like(op, "grad_out", grad_out, "out", *out);
  }
  int64_t total = 0;
  for (const int64_t c : channels) {
    FUSED_CNN_CHECK(c >= 0, op, ": channels must not be negative, got ", c);
    total += c;
  }
  FUSED_CNN_CHECK(total == grad_out.size(1), op, ": channels must add up to grad_out's ", grad_out.size(1), ", got ",
                  total);
  return total;
}

}  // namespace fused_cnn
