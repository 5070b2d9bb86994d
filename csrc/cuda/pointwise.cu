// See pointwise.h.
#include "cuda/pointwise.h"
#include "cuda/bias_residual_relu.cuh"

namespace fused_cnn {
namespace {

// Tensors one below the other, each from a multiple of `step` rows on; what lies between is not initialised.
Tensor concatenated(const std::vector<Tensor>& tensors, int64_t step = 1) {
  std::vector<Tensor> parts;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& part = tensors[i];
    parts.push_back(part);
    std::vector<int64_t> size(part.dim());
    for (int64_t axis = 0; axis < part.dim(); ++axis) size[axis] = part.size(axis);
    size[0] = ceil_div(size[0], step) * step - size[0];
    if (size[0] == 0 || i + 1 == tensors.size()) continue;
    parts.push_back(torch::stable::empty(size, part.scalar_type(), torch::headeronly::Layout::Strided, part.device()));
  }
  const auto found = call_operator("aten::cat", "", parts, /*dim=*/int64_t{0});
  return dense(torch::stable::detail::to<Tensor>(found[0]), MemoryFormat::Contiguous);
}

const char* storage_of(const Tensor& t) {
  int64_t offset = 0;
  FUSED_CNN_CHECK(aoti_torch_get_storage_offset(t.get(), &offset) == 0, "a tensor has no storage");
  return static_cast<const char*>(t.data_ptr()) - offset * t.element_size();
}

// Whether tensors lie one below the other in one memory, each from a multiple of `step` of its rows on, as
// pack_inception in Python lays them.
bool lie_stacked(const std::vector<Tensor>& parts, int64_t step) {
  const Tensor& first = parts[0];
  const char* expected = static_cast<const char*>(first.data_ptr());
  if (!aligned16(expected)) return false;
  for (const Tensor& part : parts) {
    if (part.data_ptr() != expected || !part.is_contiguous() || storage_of(part) != storage_of(first)) return false;
    const int64_t rows = part.size(0);
    if (rows > 0) expected += ceil_div(rows, step) * step * (part.numel() / rows) * part.element_size();
  }
  return true;
}

// The (outputs, in, 1, 1) tensor that begins with the rows of `first`.
Tensor whole_of(const Tensor& first, int64_t outputs) {
  const Ints size{outputs, first.size(1), 1, 1}, stride{first.size(1), 1, 1, 1};
  const auto found = call_operator("aten::as_strided", "", first, size, stride, std::optional<int64_t>());
  return torch::stable::detail::to<Tensor>(found[0]);
}

// (out, in, 1, 1) tensors, or vectors, one below the other, each from a multiple of `step` rows on: its memory is what
// counts, not its size. Where they do not lie so, they are copied; what is between them then is not initialised, and no
// result depends on it.
Tensor stacked(const std::vector<Tensor>& parts, int64_t step) {
  if (parts.size() == 1) return dense(parts[0], MemoryFormat::Contiguous);
  if (lie_stacked(parts, step)) return parts[0];
  return concatenated(parts, step);
}

}  // namespace

void finish_convolution(const Tensor& convolution, const std::optional<Tensor>& bias, const RowView& residual,
                        bool relu, const std::vector<GemmSlice>& slices) {
  const RowView y = rows_of(convolution);
  std::vector<BiasResidualRelu> branches;
  int64_t first = 0;
  for (const GemmSlice& slice : slices) {
    branches.push_back({.y = y.from(first),
                        .bias = bias ? at(bias->data_ptr(), first, bias->element_size()) : nullptr,
                        .residual = residual.data ? residual.from(first) : Rows{},
                        .out = slice.rows,
                        .channels = slice.columns});
    first += slice.columns;
  }
  bias_residual_relu</*kWideBias=*/false>(convolution, branches, relu, row_count(convolution));
}

void pointwise(const Tensor& x, const RowView& in, const std::vector<Tensor>& weights,
               const std::vector<Tensor>& biases, const RowView& residual, bool relu,
               const std::vector<GemmSlice>& slices, const Tile* found) {
  const DType dtype = dtype_of("pointwise", "x", x);
  const int64_t rows = row_count(x), inputs = x.size(1);
  int64_t outputs = 0;
  for (const GemmSlice& s : slices) outputs += s.columns;
  if (rows == 0 || outputs == 0) return;
  for (size_t i = 0; i < slices.size(); ++i) {
    if (slices[i].columns > 0) continue;
    const auto without = [&](auto list) {  // TMA takes no empty matrix
      if (!list.empty()) list.erase(list.begin() + i);
      return list;
    };
    return pointwise(x, in, without(weights), without(biases), residual, relu, without(slices), found);
  }
  std::optional<Tensor> bias;
  if (!biases.empty()) bias = stacked(biases, 1);
  bool supported = gemm_supports(dtype, rows, inputs, outputs) && slices.size() <= kGemmSlices;
  for (const GemmSlice& s : slices)
    supported &= aligned16(s.rows, x.element_size()) && s.columns % in_16_bytes(dtype) == 0;
  const int device = x.get_device_index();
  if (supported) {
    if (const GemmKernels kernels(device); kernels) {
      const Problem problem{.device = device,
                            .dtype = static_cast<int64_t>(dtype),
                            .m = rows,
                            .n = outputs,
                            .k = inputs,
                            .residual = residual.data != nullptr,
                            .slices = static_cast<int64_t>(slices.size()),
                            .kernel_height = 1,
                            .kernel_width = 1,
                            .stride = 1,
                            .library_takes_all = 0,
                            .scope = kConvolution};
      const Tile& tile = found ? *found : kernels.tile_for(problem);
      if (tile.kind == TileKind::product) {
        const RowView a = on_16_bytes(in), addend = residual.data ? on_16_bytes(residual) : residual;
        const Tensor b = on_16_bytes(stacked(weights, kernels.cores->slice_step));
        const Tensor vector = bias ? on_16_bytes(*bias) : Tensor();
        Gemm gemm{.tile = &tile,
                  .dtype = dtype,
                  .a = a,
                  .b = {b.data_ptr(), inputs},
                  .m = static_cast<int>(rows),
                  .n = static_cast<int>(outputs),
                  .k = static_cast<int>(inputs),
                  .epilogue = {.bias = bias ? vector.data_ptr() : nullptr,
                               .residual = addend,
                               .relu = relu,
                               .slices = static_cast<int>(slices.size())}};
        std::copy(slices.begin(), slices.end(), gemm.epilogue.slice);
        return kernels.run(Launch(x), gemm);
      }
    }
  }
  const Tensor weight = weights.size() == 1       ? weights[0]
                        : lie_stacked(weights, 1) ? whole_of(weights[0], outputs)
                                                  : concatenated(weights);
  finish_convolution(aten_convolution(x, weight, std::nullopt, same_padding(1)), bias, residual, relu, slices);
}

}  // namespace fused_cnn
