// See program.h.
#include <numeric>
#include "max_pool/checks.h"
#include "plan/program.h"

namespace fused_cnn::plan {
namespace {

enum Kind : int64_t { kConvolution, kMaxPool, kStage, kInception, kAverage, kConcatenation };

class Reader {
 public:
  Reader(const char* op, const Ints& program) : op_(op), program_(program) {}

  bool at_end() const { return next_ == program_.size(); }
  int64_t number() {
    FUSED_CNN_CHECK(next_ < program_.size(), op_, ": the program ends within a step");
    return program_[next_++];
  }
  Ints numbers(int64_t count) {
    FUSED_CNN_CHECK(count >= 0 && count <= static_cast<int64_t>(program_.size() - next_), op_,
                    ": the program ends within a step");
    next_ += count;
    return Ints(program_.begin() + (next_ - count), program_.begin() + next_);
  }
  Pair pair() {
    const int64_t first = number();
    return {first, number()};
  }

 private:
  const char* op_;
  const Ints& program_;
  size_t next_ = 0;
};

// Where `count` constants begin; null where there are none to look at.
const Tensor* constants_from(const char* op, const std::vector<Tensor>* constants, int64_t first, int64_t count) {
  if (constants == nullptr) return nullptr;
  const int64_t size = constants->size();
  FUSED_CNN_CHECK(first >= 0 && count >= 1 && first <= size - count, op, ": a step reads constants ", first, " to ",
                  first + count - 1, ", but there are ", size);
  return constants->data() + first;
}

constexpr size_t kMostSteps = size_t{1} << 13;  // whose bytes, each less than 2^50, do not overflow when added up

void check_size(const char* op, const Ints& sizes) {
  FUSED_CNN_CHECK(addressable({sizes[0], sizes[1], sizes[2], sizes[3]}), op, ": an activation of shape (", sizes[0],
                  ", ", sizes[1], ", ", sizes[2], ", ", sizes[3], ") is too large");
}

}  // namespace

Program read(const char* op, std::vector<Ints> inputs, DType dtype, const std::vector<Tensor>* constants,
             const Ints& numbers) {
  Program program{std::move(inputs), {}};
  for (const Ints& sizes : program.inputs) {
    FUSED_CNN_CHECK(sizes[0] == program.inputs[0][0], op, ": all inputs must have as many images, got ",
                    program.inputs[0][0], " and ", sizes[0]);
    check_size(op, sizes);
  }
  Reader reader(op, numbers);
  while (!reader.at_end()) {
    Step step;
    const auto value = [&]() -> const Ints& {
      const int64_t index = reader.number();
      FUSED_CNN_CHECK(index >= 0 && index < program.values(), op, ": step ", program.steps.size(), " reads value ",
                      index, " of ", program.values());
      step.reads.push_back(index);
      return program.sizes(index);
    };
    const int64_t kind = reader.number();
    if (kind == kConvolution) {
      const Ints sizes = value();
      const int64_t residual = reader.number(), constant = reader.number();
      const Ints weight = reader.numbers(4);
      const ConvParams params{reader.pair(), reader.pair(), reader.pair(), /*groups=*/1};
      const Pair kernel{weight[2], weight[3]};
      FUSED_CNN_CHECK(weight[1] == sizes[1] && weight[0] >= 1, op, ": a convolution with a weight of shape (",
                      weight[0], ", ", weight[1], ", ", weight[2], ", ", weight[3], ") meets ", sizes[1], " channels");
      check_geometry(op, sizes[2], sizes[3], kernel, params);
      Convolution work{conv_shape(sizes, weight[0], kernel, params), nullptr, reader.number() != 0};
      step.out = {sizes[0], weight[0], work.shape.out.h, work.shape.out.w};
      if (const Tensor* packed = constants_from(op, constants, constant, 1)) {
        check_packed(op, *packed, work.shape, dtype);
        work.packed = packed->data_ptr();
      }
      if (residual >= 0) {
        FUSED_CNN_CHECK(residual < program.values() && program.sizes(residual) == step.out, op,
                        ": a convolution's residual must have its result's shape");
        step.reads.push_back(residual);
      }
      step.work = work;
    } else if (kind == kMaxPool) {
      const Ints sizes = value();
      const Pool pool{reader.pair(), reader.pair(), reader.pair(), reader.pair(), reader.number() != 0};
      const auto [height, width] = checked_pool(op, {sizes[1], sizes[2], sizes[3]}, pool);
      MaxPool work{window_of(sizes, pool.kernel, {pool.stride, pool.padding, pool.dilation, /*groups=*/1})};
      work.window.out = {height, width};
      step.out = {sizes[0], sizes[1], height, width};
      step.work = work;
    } else if (kind == kStage) {
      const Ints sizes = value();
      const int64_t first = reader.number(), blocks = reader.number();
      const bool shortcut = reader.number() != 0, projects = reader.number() != 0;
      const Ints lengths = reader.numbers(blocks);
      for (const int64_t length : lengths) {
        FUSED_CNN_CHECK(length >= 1 && length <= static_cast<int64_t>(numbers.size()), op,
                        ": a block must have at least 1 convolution, got ", length);
      }
      const int64_t weights = std::accumulate(lengths.begin(), lengths.end(), int64_t{projects});
      const Ints geometry = reader.numbers(weights * kGeometry);
      EngineStage work(op, sizes, dtype, constants_from(op, constants, first, weights), weights, geometry, lengths,
                       shortcut, projects);
      step.out = work.out;
      step.scratch_bytes = work.scratch_bytes;
      step.work = std::move(work);
    } else if (kind == kInception) {
      const Ints sizes = value();
      const int64_t first = reader.number();
      const Ints channels = reader.numbers(6), kernels = reader.numbers(2);
      const EngineInception work(op, sizes, dtype, constants_from(op, constants, first, 4), channels, kernels);
      step.out = work.out;
      step.scratch_bytes = work.scratch_bytes;
      step.work = work;
    } else if (kind == kAverage) {
      const Ints& sizes = value();
      FUSED_CNN_CHECK(sizes[2] * sizes[3] >= 1, op, ": an average needs a pixel at least");
      step.out = {sizes[0], sizes[1], 1, 1};
      step.work = Average{};
    } else if (kind == kConcatenation) {
      const int64_t count = reader.number();
      FUSED_CNN_CHECK(count >= 1, op, ": a concatenation needs a value at least");
      for (int64_t i = 0; i < count; ++i) {
        const Ints sizes = value();
        if (i == 0) {
          step.out = sizes;
          continue;
        }
        FUSED_CNN_CHECK(sizes[2] == step.out[2] && sizes[3] == step.out[3], op,
                        ": what is concatenated must have equal heights and widths");
        step.out[1] += sizes[1];
        check_size(op, step.out);  // before the next sum
      }
      step.work = Concatenation{};
    } else {
      fail(op, ": the program has a step of kind ", kind, ", which this build does not know");
    }
    check_size(op, step.out);
    FUSED_CNN_CHECK(program.steps.size() < kMostSteps, op, ": a program may have ", kMostSteps, " steps");
    program.steps.push_back(std::move(step));
  }
  return program;
}

Layout layout_of(const Program& program, const Ints& results, int64_t element_bytes) {
  const int64_t values = program.values(), inputs = program.inputs.size(), steps = program.steps.size();
  // Of each place in the arena: its bytes, and the first and the last step that need it. Values first, then scratch.
  struct Place {
    int64_t bytes = 0, from = 0, to = -1, offset = kElsewhere;
  };
  std::vector<Place> places(values + steps);
  Layout layout;
  layout.slice_of.assign(values, -1);
  layout.first.assign(values, 0);
  std::vector<int64_t> concatenated(values, 0);
  for (int64_t s = 0; s < steps; ++s) {
    if (!std::holds_alternative<Concatenation>(program.steps[s].work)) continue;
    for (const int64_t value : program.steps[s].reads) ++concatenated[value];
  }
  const auto rounded = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  for (int64_t s = 0; s < steps; ++s) {
    const Step& step = program.steps[s];
    const Ints& n = step.out;
    places[inputs + s] = {rounded(n[0] * n[1] * n[2] * n[3] * element_bytes), s, s};
    places[values + s] = {step.scratch_bytes, s, s};
    for (const int64_t value : step.reads) places[value].to = std::max(places[value].to, s);
  }
  for (const int64_t result : results) places[result].bytes = 0;
  for (int64_t i = 0; i < inputs; ++i) places[i].bytes = 0;
  // What a step can write into a slice is written where it is concatenated.
  for (int64_t s = 0; s < steps; ++s) {
    if (!std::holds_alternative<Concatenation>(program.steps[s].work)) continue;
    int64_t first = 0;
    for (const int64_t value : program.steps[s].reads) {
      const bool is_result = std::find(results.begin(), results.end(), value) != results.end();
      if (value >= inputs && concatenated[value] == 1 && !is_result) {
        const auto& work = program.steps[value - inputs].work;
        if (std::holds_alternative<Convolution>(work) || std::holds_alternative<EngineInception>(work)) {
          layout.slice_of[value] = inputs + s;
          layout.first[value] = first;
          Place& whole = places[inputs + s];
          whole.from = std::min(whole.from, places[value].from);
          whole.to = std::max(whole.to, places[value].to);
          places[value].bytes = 0;
        }
      }
      first += program.sizes(value)[1];
    }
  }
  // The largest first, each as low as those allow that are needed at the same time.
  std::vector<size_t> order(places.size()), placed;
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return places[a].bytes > places[b].bytes; });
  for (const size_t i : order) {
    Place& place = places[i];
    if (place.bytes == 0) break;
    layout.without_overlap += place.bytes;
    int64_t offset = 0;
    for (const size_t j : placed) {  // by offset
      const Place& other = places[j];
      if (other.to < place.from || place.to < other.from) continue;
      if (offset + place.bytes <= other.offset) break;
      offset = std::max(offset, other.offset + other.bytes);
    }
    place.offset = offset;
    const auto behind = std::find_if(placed.begin(), placed.end(), [&](size_t j) { return places[j].offset > offset; });
    placed.insert(behind, i);
    layout.bytes = std::max(layout.bytes, offset + place.bytes);
  }
  for (int64_t i = 0; i < values; ++i) layout.offset.push_back(places[i].offset);
  for (int64_t s = 0; s < steps; ++s) layout.scratch.push_back(places[values + s].offset);
  return layout;
}

}  // namespace fused_cnn::plan
