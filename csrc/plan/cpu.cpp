// fused_cnn::run_plan and run_plan_into on the CPU: a network's steps one after the other, its activations in one
// arena (program.h); the second is given the arena and where the results go.
#include <chrono>
#include "cpu/parallel.h"
#include "cpu/passes.h"
#include "plan/program.h"

namespace fused_cnn {
namespace plan {
namespace {

constexpr int64_t kSumRows = 64;  // rows whose sum is a float's; sums of these are a double's

// The mean of each channel's pixels, of every image.
template <typename T>
void average(Rows x, const Ints& sizes, void* out) {
  const int64_t channels = sizes[1], pixels = sizes[2] * sizes[3];
  const int64_t strip = 256, strips = (channels + strip - 1) / strip;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, pixels * strip));
  torch::stable::parallel_for(0, sizes[0] * strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / strips, first = task % strips * strip;
      const int64_t width = std::min(strip, channels - first);
      double total[256] = {};
      for (int64_t row = 0; row < pixels; row += kSumRows) {
        float sum[256] = {};
        for (int64_t r = row; r < std::min(row + kSumRows, pixels); ++r) {
          const T* from = x.at<const T>(image * pixels + r) + first;
          for (int64_t c = 0; c < width; ++c) sum[c] += to_compute(from[c]);
        }
        for (int64_t c = 0; c < width; ++c) total[c] += sum[c];
      }
      T* to = static_cast<T*>(out) + image * channels + first;
      for (int64_t c = 0; c < width; ++c)
        from_compute(static_cast<float>(total[c] / static_cast<double>(pixels)), to++);
    }
  });
}

void copy_rows(Rows from, Rows to, int64_t rows, int64_t channels, int64_t element) {
  parallel_row_blocks(rows, channels, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      std::memcpy(at(to.data, row * to.pitch, element), at(from.data, row * from.pitch, element), channels * element);
    }
  });
}

struct Runner {
  const Program& program;
  const Layout& layout;
  const std::vector<Rows>& rows;  // by value
  DType dtype;
  int64_t element;
  char* arena;

  void run(size_t index) const {
    const Step& step = program.steps[index];
    const Rows to = rows[program.inputs.size() + index];
    const Rows x = rows[step.reads[0]];
    void* const scratch = layout.scratch[index] == kElsewhere ? nullptr : arena + layout.scratch[index];
    if (const auto* conv = std::get_if<Convolution>(&step.work)) {
      const Rows residual = step.reads.size() > 1 ? rows[step.reads[1]] : Rows{};
      const engine::Destination destination{.out = to, .residual = residual, .relu = conv->relu};
      engine::conv_forward(conv->shape, dtype, {.x = x, .packed = conv->packed, .destination = {destination}});
    } else if (const auto* pool = std::get_if<MaxPool>(&step.work)) {
      engine::max_pool(pool->window, dtype, x, to.data);
    } else if (const auto* stage = std::get_if<EngineStage>(&step.work)) {
      stage->run(x, to.data, scratch);
    } else if (const auto* block = std::get_if<EngineInception>(&step.work)) {
      block->run(x, to, scratch);
    } else if (std::holds_alternative<Average>(step.work)) {
      const Ints& sizes = program.sizes(step.reads[0]);
      if (dtype == DType::f32) return average<float>(x, sizes, to.data);
      average<bf16_t>(x, sizes, to.data);
    } else {
      concatenate(step, to);
    }
  }

  void concatenate(const Step& step, Rows to) const {
    int64_t first = 0;
    for (const int64_t value : step.reads) {
      const Ints& sizes = program.sizes(value);
      const Rows slice{at(to.data, first, element), to.pitch};
      if (rows[value].data != slice.data)
        copy_rows(rows[value], slice, sizes[0] * sizes[2] * sizes[3], sizes[1], element);
      first += sizes[1];
    }
  }
};

void check_results(const char* op, const Program& program, const Ints& results) {
  const int64_t inputs = program.inputs.size();
  std::vector<bool> seen(program.values());
  for (const int64_t result : results) {
    FUSED_CNN_CHECK(result >= inputs && result < program.values() && !seen[result], op, ": result ", result,
                    " must be a step's, and be named once; values are numbered to ", program.values() - 1);
    seen[result] = true;
  }
}

// The bytes from a tensor's first element to its last.
struct Extent {
  const char *begin, *end;

  explicit Extent(const Tensor& t) : begin(static_cast<const char*>(t.data_ptr())), end(begin) {
    if (t.numel() == 0) return;
    int64_t last = 0;
    for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
    end = begin + (last + 1) * static_cast<int64_t>(t.element_size());
  }
  bool meets(const Extent& other) const { return begin < other.end && other.begin < end; }
};

// What is written lies apart from what is read, and from what else is written.
void check_apart(const char* op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants,
                 const std::vector<Tensor>& outs, const Tensor& arena) {
  std::vector<Extent> written{Extent(arena)};
  for (const Tensor& out : outs) {
    const Extent here(out);
    for (const Extent& other : written) {
      FUSED_CNN_CHECK(!here.meets(other), op, ": outs and the arena must not share memory");
    }
    written.push_back(here);
  }
  for (const std::vector<Tensor>* read : {&inputs, &constants}) {
    for (const Tensor& t : *read) {
      const Extent here(t);
      for (const Extent& other : written) {
        FUSED_CNN_CHECK(!here.meets(other), op, ": outs and the arena must not lie where inputs or constants do");
      }
    }
  }
}

// A call: what its arguments say, checked, and where its activations will lie.
struct Call {
  DType dtype;
  int64_t element;
  Program program;
  Layout layout;

  Call(const char* op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants, const Ints& numbers,
       const Ints& results) {
    FUSED_CNN_CHECK(!inputs.empty(), op, ": an input at least is wanted");
    std::vector<Ints> sizes;
    for (const Tensor& x : inputs) {
      check_4d(op, "an input", x);
      check_like(op, "the first input", inputs[0], "an input", x, /*same_shape=*/false);
      sizes.push_back(sizes_of(x));
    }
    dtype = engine_dtype(op, inputs[0]);
    element = inputs[0].element_size();
    program = read(op, sizes, dtype, &constants, numbers);
    check_results(op, program, results);
    layout = layout_of(program, results, element);
  }

  // `outs` are the results' rows; `seconds` is told what each step took, unless it is null.
  void run(const std::vector<Tensor>& inputs, const Ints& results, const std::vector<Rows>& outs, void* arena,
           double* seconds, int64_t stride) const {
    if (program.inputs[0][0] == 0) {
      for (size_t i = 0; seconds != nullptr && i < program.steps.size(); ++i) seconds[i * stride] = 0;
      return;
    }
    char* const memory = static_cast<char*>(arena);
    std::vector<RowView> views;
    std::vector<Rows> rows(program.values());
    for (size_t i = 0; i < inputs.size(); ++i) {
      views.push_back(rows_of(inputs[i]));
      rows[i] = views.back();
    }
    for (int64_t i = inputs.size(); i < program.values(); ++i) {
      if (layout.offset[i] != kElsewhere) rows[i] = {memory + layout.offset[i], program.sizes(i)[1]};
    }
    for (size_t i = 0; i < results.size(); ++i) rows[results[i]] = outs[i];
    for (int64_t i = 0; i < program.values(); ++i) {  // the concatenations have their places now
      if (layout.slice_of[i] < 0) continue;
      const Rows& whole = rows[layout.slice_of[i]];
      rows[i] = {at(whole.data, layout.first[i], element), whole.pitch};
    }
    const Runner runner{program, layout, rows, dtype, element, memory};
    for (size_t i = 0; i < program.steps.size(); ++i) {
      const auto start = std::chrono::steady_clock::now();
      runner.run(i);
      if (seconds == nullptr) continue;
      seconds[i * stride] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
  }
};

std::vector<Tensor> run_plan(std::vector<Tensor> inputs, std::vector<Tensor> constants, Ints numbers, Ints results) {
  const Call call("run_plan", inputs, constants, numbers, results);
  std::vector<RowResult> made;
  std::vector<Rows> outs;
  for (const int64_t result : results) {
    const Ints& sizes = call.program.sizes(result);
    made.emplace_back(inputs[0], sizes[1], sizes[2], sizes[3], result_format(inputs[0]));
    outs.push_back(made.back());
  }
  thread_local Workspace arena;  // kept, as fresh pages would cost more than a small network does
  call.run(inputs, results, outs, arena.at_least(call.layout.bytes), nullptr, 0);
  return finished(made);
}

void run_plan_into(std::vector<Tensor> inputs, std::vector<Tensor> constants, Ints numbers, Ints results,
                   std::vector<Tensor> outs, Tensor arena, std::optional<Tensor> seconds) {
  const char* op = "run_plan_into";
  const Call call(op, inputs, constants, numbers, results);
  FUSED_CNN_CHECK(outs.size() == results.size(), op, ": as many outs as results are wanted, ", results.size(), ", got ",
                  outs.size());
  std::vector<Rows> rows;
  for (size_t i = 0; i < outs.size(); ++i) {
    const Ints& sizes = call.program.sizes(results[i]);
    check_result_shape(op, "an out", outs[i], inputs[0], sizes[1], sizes[2], sizes[3]);
    FUSED_CNN_CHECK(outs[i].numel() == 0 || is_dense(outs[i], MemoryFormat::ChannelsLast), op,
                    ": an out must be channels_last");
    rows.push_back({outs[i].data_ptr(), sizes[1]});
  }
  FUSED_CNN_CHECK(arena.is_cpu() && arena.scalar_type() == ScalarType::Byte && arena.dim() == 1 &&
                      arena.is_contiguous() && reinterpret_cast<uintptr_t>(arena.data_ptr()) % 64 == 0,
                  op, ": the arena must be bytes on the CPU, in one dimension, contiguous and 64-byte aligned");
  check_apart(op, inputs, constants, outs, arena);
  const int64_t steps = call.program.steps.size();
  FUSED_CNN_CHECK(!seconds || (seconds->is_cpu() && seconds->scalar_type() == ScalarType::Double &&
                               seconds->dim() == 1 && seconds->size(0) == steps),
                  op, ": seconds must be ", steps, " float64 on the CPU, one a step");
  // One that is too small was made for another number of threads.
  Workspace own;
  void* const memory = arena.size(0) >= call.layout.bytes ? arena.data_ptr() : own.at_least(call.layout.bytes);
  call.run(inputs, results, rows, memory, seconds ? static_cast<double*>(seconds->data_ptr()) : nullptr,
           seconds ? seconds->stride(0) : 0);
}

}  // namespace
}  // namespace plan
}  // namespace fused_cnn

// The bytes of a program's arena, and of one without overlap; a negative number where the program is wrong, whose
// message then goes to `message`. `inputs` has four sizes of each.
FUSED_CNN_EXPORT int64_t fused_cnn_plan_bytes(const int64_t* inputs, int64_t input_count, bool bfloat16,
                                              const int64_t* numbers, int64_t count, const int64_t* results,
                                              int64_t result_count, int64_t* without_overlap, char* message,
                                              int64_t message_size) try {
  using namespace fused_cnn;
  std::vector<Ints> sizes;
  for (int64_t i = 0; i < input_count; ++i) sizes.emplace_back(inputs + 4 * i, inputs + 4 * i + 4);
  const plan::Program program =
      plan::read("run_plan", sizes, bfloat16 ? DType::bf16 : DType::f32, nullptr, Ints(numbers, numbers + count));
  const Ints wanted(results, results + result_count);
  plan::check_results("run_plan", program, wanted);
  const plan::Layout layout = plan::layout_of(program, wanted, bfloat16 ? 2 : 4);
  *without_overlap = layout.without_overlap;
  return layout.bytes;
} catch (const std::exception& error) {
  std::snprintf(message, message_size, "%s", error.what());
  return -1;
}

STABLE_TORCH_LIBRARY_IMPL(fused_cnn, CPU, m) {
  m.impl("run_plan", FUSED_CNN_BOX(&fused_cnn::plan::run_plan));
  m.impl("run_plan_into", FUSED_CNN_BOX(&fused_cnn::plan::run_plan_into));
}
