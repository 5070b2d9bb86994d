// Chooses the kernels for this CPU, cuts a convolution into items and hands them to the caller's threads. Compiled for
// the base instruction set. Memory: one scratch buffer per thread, kept between calls; everything else is the caller's.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <vector>
#include "cpu/engine/conv_plan.h"

namespace fused_cnn::engine {
namespace {

constexpr int64_t kPanelVectors = 2;
constexpr int64_t kCacheLine = 64;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

const Level* current() {
  return &FUSED_CNN_PICK(engine_level);
}

struct ScratchBuffer {
  void* data = nullptr;
  int64_t bytes = 0;
  void* at_least(int64_t wanted) {
    if (wanted > bytes) {
      std::free(data);
      bytes = round_up(wanted, 4096);
      data = std::aligned_alloc(4096, bytes);
      if (data == nullptr) {
        bytes = 0;
        throw std::bad_alloc();
      }
    }
    return data;
  }
  ~ScratchBuffer() { std::free(data); }
};
thread_local ScratchBuffer scratch_buffer;

int64_t step_size(const Level& level, DType dtype) {
  return dtype == DType::bf16 ? level.bf16_step : 1;
}

int64_t element_size(const Level& level, DType dtype) {  // as the kernels read it
  return step_size(level, dtype) > 1 ? 2 : 4;
}

Reduction reduction(const ConvShape& s, int64_t step) {
  const bool fold = s.kernel_w > 1 && (s.dilation_w == 1 || step == kMatrixStep) && s.C < 16;
  const int64_t run = fold ? s.kernel_w * s.C : s.C;
  return {s.kernel_h, fold ? 1 : s.kernel_w, run, round_up(std::max<int64_t>(run, 1), step), fold};
}

// Costs of a 3 x 3 convolution in multiply-adds of vectors per pair of channels. The transforms' share, and 15% for
// sums that pass through memory, measured on Zen 4 (2 cores, 2026-11-25).
double direct_cost(const Plan& plan, int64_t pixels) {
  return 9.0 * pixels / (plan.dtype == DType::bf16 ? step_size(*current(), plan.dtype) : 1);
}

int64_t all_out_channels(const ConvShape& s) {
  return std::accumulate(s.out_channels, s.out_channels + s.destinations, int64_t{0});
}

int64_t winograd_tiles(const ConvShape& s) {  // of the whole call, those that overhang the images included
  return s.batch * ceil_div(conv_out_h(s), 2) * ceil_div(conv_out_w(s), 4);
}

double winograd_cost(const ConvShape& s, int64_t tiles) {
  const int64_t out = all_out_channels(s);
  return kWinogradPositions * tiles * (1.15 + 9.0 / s.C + 7.0 / out);
}

// Whether transformed weights are packed as well. In bfloat16 only small ones: they are float, 24 for 9, and the layers
// with large ones have images so small that it does not pay.
bool takes_winograd(const Plan& plan) {
  const ConvShape& s = plan.shape;
  if (s.kernel_h != 3 || s.kernel_w != 3 || s.stride_h * s.stride_w * s.dilation_h * s.dilation_w != 1) return false;
  if (plan.matrix || (plan.dtype == DType::bf16 && plan.vectors * current()->lanes * s.C > 1 << 16)) return false;
  return winograd_cost(s, 1) < direct_cost(plan, 8);
}

// Whether this call uses them: tiles that overhang small images are wasted, and with few pixels reading the weights is
// what takes the time (a thread reads about 3 bytes a cycle). What is added in place could not be added again.
bool winograd_pays(const Plan& plan, bool in_place) {
  const ConvShape& s = plan.shape;
  if (plan.winograd.panel_bytes == 0 || in_place) return false;
  const Level& level = *current();
  const double per_byte = level.lanes / 3.0;
  return winograd_cost(s, winograd_tiles(s)) + kWinogradPositions * 4 * per_byte <
         direct_cost(plan, s.batch * conv_out_h(s) * conv_out_w(s)) + 9 * element_size(level, plan.dtype) * per_byte;
}

// The part of the plan that the packed layout depends on.
Plan plan_weight(const ConvShape& shape, DType dtype, const void* packed) {
  const Level& level = *current();
  Plan plan{};
  plan.shape = shape;
  plan.dtype = dtype;
  plan.reduction = reduction(shape, step_size(level, dtype));
  plan.matrix = step_size(level, dtype) == kMatrixStep;
  for (int d = 0; d < shape.destinations; d++)
    plan.vector_of[d + 1] = plan.vector_of[d] + ceil_div(shape.out_channels[d], level.lanes);
  plan.vectors = plan.vector_of[shape.destinations];
  plan.panels = ceil_div(plan.vectors, kPanelVectors);
  const Reduction& r = plan.reduction;
  plan.panel_bytes = r.taps_h * r.taps_w * r.padded * kPanelVectors * level.lanes * element_size(level, dtype);
  plan.bias_bytes = round_up(plan.vectors * level.lanes * 4, kCacheLine);
  plan.direct_bytes = plan.packed_bytes = plan.bias_bytes + ceil_div(plan.panel_bytes * plan.vectors, kPanelVectors);
  if (takes_winograd(plan)) {
    plan.winograd.panel_bytes = kWinogradPositions * shape.C * kPanelVectors * level.lanes * 4;
    plan.direct_bytes = round_up(plan.direct_bytes, kCacheLine);
    plan.packed_bytes = plan.direct_bytes + ceil_div(plan.winograd.panel_bytes * plan.vectors, kPanelVectors);
  }
  if (packed == nullptr) return plan;  // it is asked for sizes
  plan.args.packed = packed;
  plan.bias = (const float*)packed;
  plan.weight = (const char*)packed + plan.bias_bytes;
  if (plan.winograd.panel_bytes > 0) plan.winograd.weight = (const char*)packed + plan.direct_bytes;
  return plan;
}

// Blocks: enough pixels to use a weight panel several times while it is in cache, few enough that their input stays in
// L2 beside it, and with the groups of panels enough items to keep all threads busy to the end.
void plan_blocks(Plan& plan, const Level& level, int threads) {
  ConvShape& s = plan.shape;
  const Reduction& r = plan.reduction;
  const int64_t size = element_size(level, plan.dtype), tile = plan.matrix ? kMatrixPixels : level.tile_pixels;
  plan.out_h = conv_out_h(s), plan.out_w = conv_out_w(s);
  const bool pointwise = s.kernel_h * s.kernel_w == 1;
  const bool flat = pointwise && s.stride_h * s.stride_w == 1 && s.pad_h + s.pad_w == 0;
  if (flat) {
    s.W = plan.out_w = s.N * s.H * s.W;
    s.N = s.H = plan.out_h = 1;
  }
  plan.step_h = s.kernel_h == 1 ? 1 : s.stride_h;
  plan.step_w = s.kernel_w == 1 ? 1 : s.stride_w;

  // Tile pixels 2 KiB (or a multiple) apart share a few L1 sets, and evict each other at every k.
  const int64_t x_size = plan.dtype == DType::bf16 ? 2 : 4;
  const bool aliased = s.stride_w * plan.args.x_pitch * size % 4096 == 0;
  plan.gather = s.pad_h || s.pad_w || size != x_size || aliased || (plan.reduction.fold && plan.args.x_pitch != s.C);
  if (plan.gather) {
    const int64_t lines = ceil_div(s.C * size, kCacheLine) | 1;  // odd, for the same reason
    plan.pitch = plan.reduction.fold ? s.C : lines * kCacheLine / size;
  } else {
    plan.pitch = plan.args.x_pitch;
    plan.step_h = s.stride_h, plan.step_w = s.stride_w;
  }

  const int64_t reach_h = (s.kernel_h - 1) * s.dilation_h + 1, reach_w = (s.kernel_w - 1) * s.dilation_w + 1;
  plan.phases_h = plan.phases_w = 1;
  int64_t wanted = 16 * tile;  // pixels per block
  if (plan.matrix) {
    // The sums are so fast that copying the rows which two blocks share shows; a pointwise convolution shares none.
    wanted = (pointwise ? 8 : 64) * tile;
    plan.gather = r.fold || r.run < r.padded || s.pad_h || s.pad_w || s.stride_h * s.stride_w > 1;
    plan.pitch = plan.gather ? r.padded : plan.args.x_pitch;
    plan.phases_h = std::min(s.stride_h, reach_h);
    plan.phases_w = r.fold ? 1 : std::min(s.stride_w, reach_w);
  }
  for (;; wanted /= 2) {
    if (flat) {
      plan.block_h = 1;
      plan.block_w = round_up(ceil_div(plan.out_w, ceil_div(plan.out_w, wanted)), tile);
    } else {
      const int64_t rows = std::max<int64_t>(1, wanted / plan.out_w), even = plan.out_w * 2 <= tile ? 2 : 1;
      plan.block_h = std::min(plan.out_h, round_up(ceil_div(plan.out_h, ceil_div(plan.out_h, rows)), even));
      plan.block_w = plan.out_w;
    }
    plan.in_h = (plan.block_h - 1) * plan.step_h + reach_h;
    plan.in_w = (plan.block_w - 1) * plan.step_w + reach_w;
    if (plan.matrix) {
      plan.in_h = plan.block_h + (reach_h - 1) / s.stride_h;
      plan.in_w = plan.block_w + (r.fold ? 0 : (reach_w - 1) / s.stride_w);
    }
    plan.blocks_y = ceil_div(plan.out_h, plan.block_h);
    plan.blocks_x = ceil_div(plan.out_w, plan.block_w);
    const int64_t blocks = s.N * plan.blocks_y * plan.blocks_x;
    const bool fits =
        plan.phases_h * plan.phases_w * plan.in_h * plan.in_w * (plan.matrix ? plan.pitch : s.C) * size <= 640 * 1024;
    const bool busy = threads == 1 || blocks * plan.panels >= 8 * threads;
    plan.groups = threads == 1 ? 1 : std::min(plan.panels, ceil_div((plan.matrix ? 8 : 12) * threads, blocks));
    if ((fits && busy) || wanted <= tile) break;
  }
  plan.tiles_first = ceil_div(plan.panels, plan.groups) * plan.panel_bytes <= 512 * 1024;
}

// Where the pixels of each tap begin in the images of a block, for matrix units (see Plan).
std::vector<int64_t> tap_offsets(const Plan& plan) {
  const ConvShape& s = plan.shape;
  std::vector<int64_t> offsets;
  for (int64_t h = 0; h < plan.reduction.taps_h; h++) {
    for (int64_t w = 0; w < plan.reduction.taps_w; w++) {
      const int64_t y = h * s.dilation_h, x = w * s.dilation_w;
      const int64_t image = y % s.stride_h * plan.phases_w + x % s.stride_w;
      offsets.push_back(((image * plan.in_h + y / s.stride_h) * plan.in_w + x / s.stride_w) * plan.pitch * 2);
    }
  }
  return offsets;
}

// Blocks of as many tiles as make two calls of the microkernel: a position's weights then serve twice from L1.
void plan_winograd(Plan& plan, const Level& level, int threads) {
  const ConvShape& s = plan.shape;
  Winograd& wg = plan.winograd;
  plan.out_h = conv_out_h(s), plan.out_w = conv_out_w(s);
  wg.tiles_y = ceil_div(plan.out_h, 2), wg.tiles_x = ceil_div(plan.out_w, 4);
  wg.tiles = s.N * wg.tiles_y * wg.tiles_x;
  wg.pitch = (ceil_div(s.C * 4, kCacheLine) | 1) * kCacheLine / 4;  // odd: see plan_blocks
  wg.blocks = ceil_div(wg.tiles, 2 * level.tile_pixels);
  wg.block_tiles = ceil_div(wg.tiles, wg.blocks);
  plan.groups = threads == 1 ? 1 : std::min(plan.panels, ceil_div(12 * threads, wg.blocks));
  plan.items = wg.blocks * plan.groups;
}

struct Work {
  const Plan& plan;
  void (*run_item)(const Plan& plan, int64_t item, Scratch& scratch);
  int64_t scratch_bytes;
  std::atomic<int64_t> next{0};
};

// Threads take items as they come free, so that one delayed by other work on the machine does not delay the call.
void take_items(int64_t, int64_t, void* context) {
  Work& work = *static_cast<Work*>(context);
  Scratch scratch{work.scratch_bytes > 0 ? scratch_buffer.at_least(work.scratch_bytes) : nullptr, -1};
  for (int64_t item; (item = work.next.fetch_add(1, std::memory_order_relaxed)) < work.plan.items;)
    work.run_item(work.plan, item, scratch);
}

void run_items(Plan& plan, Work& work, const ThreadPool& pool) {
  plan.workers = std::min<int64_t>(pool.threads, plan.items);
  if (plan.workers <= 1)
    take_items(0, 1, &work);
  else
    pool.parallel_for(plan.workers, 1, take_items, &work);
}

struct PoolWork {
  const PoolShape& shape;
  const Level& level;
  DType dtype;
  const void* x;
  int64_t x_pitch;
  void* out;
  int64_t out_pitch;
};

void pool_rows(int64_t begin, int64_t end, void* context) {
  const PoolWork& w = *static_cast<const PoolWork*>(context);
  for (int64_t row = begin; row < end; row++)
    w.level.max_pool_row(w.shape, w.dtype, w.x, w.x_pitch, w.out, w.out_pitch, row);
}

}  // namespace

namespace {
int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t room = size + 2 * pad - (kernel - 1) * dilation - 1;
  return room < 0 ? 0 : room / stride + 1;  // division rounds towards zero
}
}  // namespace

int64_t conv_out_h(const ConvShape& s) {
  return out_size(s.H, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h);
}

int64_t conv_out_w(const ConvShape& s) {
  return out_size(s.W, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w);
}

int64_t packed_weight_bytes(const ConvShape& shape, DType dtype) {
  return plan_weight(shape, dtype, nullptr).packed_bytes;
}

int64_t packed_bytes_read(const ConvShape& shape, DType dtype, bool in_place) {
  const Plan plan = plan_weight(shape, dtype, nullptr);
  if (plan.winograd.panel_bytes == 0) return plan.packed_bytes;
  return winograd_pays(plan, in_place) ? plan.bias_bytes + plan.packed_bytes - plan.direct_bytes : plan.direct_bytes;
}

int64_t multiply_adds(const ConvShape& s, DType dtype, bool in_place) {
  const int64_t pairs = s.C * all_out_channels(s);
  if (winograd_pays(plan_weight(s, dtype, nullptr), in_place)) return kWinogradPositions * winograd_tiles(s) * pairs;
  return s.batch * conv_out_h(s) * conv_out_w(s) * s.kernel_h * s.kernel_w * pairs;
}

void pack_weight(const ConvShape& shape, DType dtype, const void* const* weight, const float* const* bias,
                 void* packed) {
  current()->pack(plan_weight(shape, dtype, packed), weight, bias, packed);
}

void conv_forward(const ConvShape& shape, DType dtype, const ConvArgs& args, const ThreadPool& pool) {
  if (shape.N * conv_out_h(shape) * conv_out_w(shape) <= 0) return;
  const Level& level = *current();
  Plan plan = plan_weight(shape, dtype, args.packed);
  plan.args = args;
  bool in_place = false;
  for (int d = 0; d < shape.destinations; d++) in_place |= args.destination[d].residual == args.destination[d].out;
  if (winograd_pays(plan, in_place)) {
    int nonfinite = 0;
    plan.winograd.nonfinite = &nonfinite;
    plan_winograd(plan, level, pool.threads);
    const Winograd& wg = plan.winograd;
    Work work{plan, level.run_item_winograd,
              kWinogradPositions * wg.block_tiles * (wg.pitch + kPanelVectors * level.lanes) * 4};
    run_items(plan, work, pool);
    if (!nonfinite) return;
  }
  plan_blocks(plan, level, pool.threads);
  std::vector<int64_t> offsets;
  if (plan.matrix) offsets = tap_offsets(plan), plan.tap_offset = offsets.data();
  plan.items = plan.shape.N * plan.blocks_y * plan.blocks_x * plan.groups;
  const int64_t pixels = plan.phases_h * plan.phases_w * plan.in_h * plan.in_w;
  Work work{plan, level.run_item, plan.gather ? pixels * plan.pitch * element_size(level, dtype) : 0};
  run_items(plan, work, pool);
}

void max_pool(const PoolShape& shape, DType dtype, const void* x, int64_t x_pitch, void* out, int64_t out_pitch,
              const ThreadPool& pool) {
  const int64_t rows = shape.N * shape.out_h, per_row = shape.out_w * shape.C * shape.kernel_h * shape.kernel_w;
  PoolWork work{shape, *current(), dtype, x, x_pitch, out, out_pitch};
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, per_row));
  if (pool.threads <= 1 || rows <= grain)
    pool_rows(0, rows, &work);
  else
    pool.parallel_for(rows, grain, pool_rows, &work);
}

namespace {

struct PoolBackwardWork {
  const PoolShape& shape;
  const Level& level;
  DType dtype;
  const void* x;
  int64_t x_pitch;
  const void* grad_out;
  void* grad_x;
  int64_t vectors, groups, bands;  // of channels in a group; groups of channels, bands of output rows
};

int64_t ring_pixels(const PoolShape& s) {
  return (s.dilation_h * (s.kernel_h - 1) + 1) * s.W;
}

void pool_backward_items(int64_t begin, int64_t end, void* context) {
  const PoolBackwardWork& w = *static_cast<const PoolBackwardWork*>(context);
  const PoolShape& s = w.shape;
  const int64_t channels = w.vectors * w.level.lanes;
  float* ring = static_cast<float*>(scratch_buffer.at_least(ring_pixels(s) * channels * sizeof(float)));
  for (int64_t item = begin; item < end; item++) {
    const int64_t part = item / w.groups, band = part % w.bands;
    w.level.max_pool_backward(s, w.dtype, w.x, w.x_pitch, w.grad_out, w.grad_x,
                              {part / w.bands, band * s.out_h / w.bands, (band + 1) * s.out_h / w.bands,
                               item % w.groups * channels, w.vectors},
                              ring);
  }
}

}  // namespace

void max_pool_backward(const PoolShape& shape, DType dtype, const void* x, int64_t x_pitch, const void* grad_out,
                       void* grad_x, const ThreadPool& pool) {
  constexpr int64_t kItemsPerThread = 4, kBandRows = 4, kRingBytes = 192 << 10;  // a ring lies in L2
  const Level& level = *current();
  const int64_t pixel_bytes = ring_pixels(shape) * level.lanes * sizeof(float);
  const int64_t vectors =
      std::clamp<int64_t>(kRingBytes / std::max<int64_t>(1, pixel_bytes), 1, ceil_div(shape.C, level.lanes));
  const int64_t groups = ceil_div(shape.C, vectors * level.lanes), parts = shape.N * groups;
  const int64_t bands = pool.threads <= 1 ? 1
                                          : std::clamp<int64_t>(ceil_div(kItemsPerThread * pool.threads, parts), 1,
                                                                std::max<int64_t>(1, shape.out_h / kBandRows));
  PoolBackwardWork work{shape, level, dtype, x, x_pitch, grad_out, grad_x, vectors, groups, bands};
  const int64_t items = parts * bands;
  if (pool.threads <= 1 || items <= 1)
    pool_backward_items(0, items, &work);
  else
    pool.parallel_for(items, 1, pool_backward_items, &work);
}

}  // namespace fused_cnn::engine
