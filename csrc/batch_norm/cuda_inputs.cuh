// What the forward and the backward of batch_norm share on CUDA: a branch as the kernels see it, the per-channel
// vectors of a thread's octet, and the host's checks and views of the inputs.
#pragma once
#include "batch_norm/checks.h"
#include "batch_norm/math.h"
#include "cuda/column_reduction.cuh"

namespace fused_cnn {

enum class Residual { none, plain, normalized };

// Rows of x and, at x's first channel, its statistics and parameters.
template <typename T>
struct BnInput {
  const T* x;
  int64_t pitch;
  const compute_t<T>*mean, *rstd, *weight, *bias;
};

template <typename T>
struct BnBranch {
  int64_t channels, first;  // first: its place among the channels of all branches
  BnInput<T> in[2];         // x; the residual, of which a plain one has rows only
  T* y;                     // forward: its slice of the result; backward: of grad_out
  int64_t y_pitch;
  T* grad[2];  // backward: the gradients of x and of the residual, rows of `channels`
  bool training[2];
  double eps;
};

template <typename T>
struct BnVectors {
  Octet<compute_t<T>> mean, scale, bias;

  template <bool kVectors>
  __device__ static BnVectors load(const BnInput<T>& in, const Place& place) {
    BnVectors v;
    v.mean = load_octet<kVectors>(in.mean + place.channel, place.n);
    v.scale = load_octet<kVectors>(in.rstd + place.channel, place.n);
    v.bias = load_octet<kVectors>(in.bias + place.channel, place.n);
    const auto weight = load_octet<kVectors>(in.weight + place.channel, place.n);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) v.scale.v[j] *= weight.v[j];
    return v;
  }
  __device__ compute_t<T> normalize(T x, int j) const {
    return batch_norm::normalize(to_compute(x), mean.v[j], scale.v[j], bias.v[j]);
  }
};

// Normalised inputs and their per-channel vectors, checked, on their device and stream; they keep the memory alive that
// branches point to.
class BnInputs {
 public:
  int64_t total;
  Launch launch;
  DType dtype;
  ScalarType vector_type;
  int64_t rows;

  BnInputs(const char* op, const std::vector<Tensor>& xs, const Tensor& mean, const Tensor& rstd,
           const std::vector<Tensor>& weights, const std::vector<Tensor>& biases)
      : total(check_branches(op, xs)),
        launch(xs[0]),
        dtype(dtype_of(op, "x", xs[0])),
        vector_type(vector_dtype(dtype)),
        rows(row_count(xs[0])),
        mean_(checked_vector(op, "mean", mean, total, xs[0], vector_type)),
        rstd_(checked_vector(op, "rstd", rstd, total, xs[0], vector_type)) {
    check_parameters(op, xs.size(), weights.size(), biases.size());
    for (size_t i = 0; i < xs.size(); ++i) {
      const int64_t channels = xs[i].size(1);
      views_.push_back(rows_of(xs[i]));
      weights_.push_back(checked_vector(op, "weight", weights[i], channels, xs[0], vector_type));
      biases_.push_back(checked_vector(op, "bias", biases[i], channels, xs[0], vector_type));
      channels_.push_back(channels);
    }
  }

  const void* rstd() const { return rstd_.data_ptr(); }

  // Every input as a branch of its own; the results' places are still to be filled in.
  template <typename T>
  std::vector<BnBranch<T>> branches() const {
    std::vector<BnBranch<T>> found;
    int64_t first = 0;
    for (size_t i = 0; i < views_.size(); ++i) {
      using C = const compute_t<T>;
      BnBranch<T> branch{};
      branch.channels = channels_[i], branch.first = first;
      branch.in[0] = {static_cast<const T*>(views_[i].data),     views_[i].stride,
                      static_cast<C*>(mean_.data_ptr()) + first, static_cast<C*>(rstd_.data_ptr()) + first,
                      static_cast<C*>(weights_[i].data_ptr()),   static_cast<C*>(biases_[i].data_ptr())};
      found.push_back(branch);
      first += channels_[i];
    }
    return found;
  }

  // x and its residual, whether that is normalised or not, as one branch.
  template <typename T>
  std::vector<BnBranch<T>> branch_with(const RowView* plain) const {
    std::vector<BnBranch<T>> found = branches<T>();
    if (plain) found[0].in[1] = {static_cast<const T*>(plain->data), plain->stride, nullptr, nullptr, nullptr, nullptr};
    if (found.size() == 2) found[0].in[1] = found[1].in[0], found.pop_back();
    return found;
  }

 private:
  Tensor mean_, rstd_;
  std::vector<RowView> views_;
  std::vector<Tensor> weights_, biases_;
  std::vector<int64_t> channels_;
};

// Whether everything that the branches point to can move 16 bytes at a time.
template <typename T>
bool on_vectors(const std::vector<BnBranch<T>>& branches) {
  return std::all_of(branches.begin(), branches.end(), [](const BnBranch<T>& b) {
    bool all = b.channels % kOctet == 0 && on_vectors(b.y, b.y_pitch, sizeof(T));
    for (const BnInput<T>& in : b.in) {
      all = all && on_vectors(in.x, in.pitch, sizeof(T)) && aligned16(in.mean) && aligned16(in.rstd) &&
            aligned16(in.weight) && aligned16(in.bias);
    }
    return all && aligned16(b.grad[0]) && aligned16(b.grad[1]);
  });
}

}  // namespace fused_cnn
