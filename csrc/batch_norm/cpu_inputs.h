// What the forward and the backward of batch_norm share on the CPU: the normalised inputs as rows of channels
// beside their per-channel vectors, all checked, and a loop over channels for combining partial sums.
#pragma once
#include <optional>
#include <tuple>
#include "batch_norm/checks.h"
#include "batch_norm/cpu_kernels.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace fused_cnn {

// The checked inputs as the kernels see them; scale is rstd * weight.
struct Inputs : NormalizedInputs {
  int64_t element_size, vector_size;
  std::unique_ptr<char[]> scale;
  std::vector<BnInput> branches;
  std::vector<int64_t> channels;

  Inputs(const char* op, const Tensors& xs, const Tensor& mean_, const Tensor& rstd_, const Tensors& weights_,
         const Tensors& biases_)
      : NormalizedInputs(op, xs, mean_, rstd_, weights_, biases_),
        element_size(xs[0].element_size()),
        vector_size(mean.element_size()),
        scale(scratch(total * vector_size)) {
    for (size_t i = 0; i < xs.size(); ++i) {
      channels.push_back(xs[i].size(1));
      multiply(vector_at(rstd.data_ptr(), first[i]), weights[i].data_ptr(), vector_at(scale.get(), first[i]),
               channels[i]);
      branches.push_back({views[i].data, views[i].stride, vector_at(mean.data_ptr(), first[i]),
                          vector_at(scale.get(), first[i]), biases[i].data_ptr()});
    }
  }

  void multiply(const void* a, const void* b, void* out, int64_t n) const {
    const auto run = [&]<typename C>(C) {
      for (int64_t c = 0; c < n; ++c)
        static_cast<C*>(out)[c] = static_cast<const C*>(a)[c] * static_cast<const C*>(b)[c];
    };
    dtype == DType::f64 ? run(double{}) : run(float{});
  }
  char* vector_at(void* v, int64_t channel) const { return at(v, channel, vector_size); }
  BnInput from_row(size_t branch, int64_t row) const {
    BnInput in = branches[branch];
    in.x = at(in.x, row * in.stride, element_size);
    return in;
  }
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
