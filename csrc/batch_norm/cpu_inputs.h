// What the forward and the backward of batch_norm share on the CPU: the normalised inputs as rows of channels beside
// their per-channel vectors, all checked, and a loop over channels for combining partial sums.
#pragma once
#include "batch_norm/checks.h"
#include "batch_norm/cpu_kernels.h"
#include "cpu/memory.h"
#include "cpu/tensor_rows.h"

namespace fused_cnn {

// Normalised inputs and their per-channel vectors, checked; input i's channels begin at first[i].
struct Inputs {
  DType dtype;
  ScalarType vector_type;
  int64_t vector_size;
  int64_t rows, total;
  std::vector<RowView> views;
  std::vector<Tensor> biases;  // keeps them alive
  Tensor mean, rstd;
  std::unique_ptr<char[]> scale;
  std::vector<BnInput> inputs;
  std::vector<int64_t> first, channels;

  Inputs(const char* op, const std::vector<Tensor>& xs, const Tensor& mean_, const Tensor& rstd_,
         const std::vector<Tensor>& weights, const std::vector<Tensor>& biases_)
      : total(check_branches(op, xs)) {
    const Tensor& x = xs[0];
    dtype = dtype_of(op, "x", x);
    vector_type = vector_dtype(dtype);
    rows = row_count(x);
    check_parameters(op, xs.size(), weights.size(), biases_.size());
    mean = checked_vector(op, "mean", mean_, total, x, vector_type);
    rstd = checked_vector(op, "rstd", rstd_, total, x, vector_type);
    vector_size = mean.element_size();
    scale = scratch(total * vector_size);
    int64_t begin = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      const int64_t c = xs[i].size(1);
      views.push_back(rows_of(xs[i]));
      const Tensor weight = checked_vector(op, "weight", weights[i], c, x, vector_type);
      biases.push_back(checked_vector(op, "bias", biases_[i], c, x, vector_type));
      with_type(dtype, [&](auto element) {
        using C = compute_t<decltype(element)>;
        const C *r = static_cast<const C*>(rstd.data_ptr()) + begin, *w = static_cast<const C*>(weight.data_ptr());
        std::transform(r, r + c, w, reinterpret_cast<C*>(scale.get()) + begin, std::multiplies<C>());
      });
      inputs.push_back({.x = rows_at(views[i]),
                        .mean = vector_at(mean.data_ptr(), begin),
                        .scale = vector_at(scale.get(), begin),
                        .bias = biases[i].data_ptr()});
      first.push_back(begin);
      channels.push_back(c);
      begin += c;
    }
  }

  char* vector_at(void* v, int64_t channel) const { return at(v, channel, vector_size); }
};

constexpr int64_t kFinishChannels = 256;

// body(first channel, how many) for every channel, at most kFinishChannels at a time.
template <typename Body>
void parallel_channels(int64_t channels, const Body& body) {
  torch::stable::parallel_for(0, channels, kFinishChannels, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kFinishChannels) body(c, std::min(kFinishChannels, end - c));
  });
}

}  // namespace fused_cnn
