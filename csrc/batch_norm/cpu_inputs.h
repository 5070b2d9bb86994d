// What the forward and the backward of batch_norm share on the CPU: the normalised inputs as rows of channels beside
// their per-channel vectors, all checked, and a loop over channels for combining partial sums.
#pragma once
#include "batch_norm/checks.h"
#include "batch_norm/cpu_kernels.h"
#include "cpu/memory.h"
#include "cpu/tensor_rows.h"

namespace fused_cnn {

// The checked inputs as the kernels see them; scale is rstd * weight.
struct Inputs : NormalizedInputs {
  int64_t vector_size;
  std::unique_ptr<char[]> scale;
  std::vector<BnInput> inputs;
  std::vector<int64_t> channels;

  Inputs(const char* op, const Tensors& xs, const Tensor& mean_, const Tensor& rstd_, const Tensors& weights_,
         const Tensors& biases_)
      : NormalizedInputs(op, xs, mean_, rstd_, weights_, biases_),
        vector_size(mean.element_size()),
        scale(scratch(total * vector_size)) {
    for (size_t i = 0; i < xs.size(); ++i) {
      const int64_t begin = first[i], c = xs[i].size(1);
      with_type(dtype, [&](auto element) {
        using C = compute_t<decltype(element)>;
        const C *r = static_cast<const C*>(rstd.data_ptr()) + begin, *w = static_cast<const C*>(weights[i].data_ptr());
        std::transform(r, r + c, w, reinterpret_cast<C*>(scale.get()) + begin, std::multiplies<C>());
      });
      inputs.push_back({.x = rows_at(views[i]),
                        .mean = vector_at(mean.data_ptr(), begin),
                        .scale = vector_at(scale.get(), begin),
                        .bias = biases[i].data_ptr()});
      channels.push_back(c);
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
