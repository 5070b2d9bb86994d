// Chooses the kernels for this CPU, cuts a call into items and hands them to PyTorch's threads. Compiled for the base
// instruction set. Memory: one scratch buffer per thread, kept between calls; everything else is the caller's.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <vector>
#include "cpu/engine/conv_plan.h"
#include "cpu/parallel.h"
#include "shared/checks.h"

namespace fused_cnn::engine {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kMostScratch = int64_t{1} << 32;  // bytes a thread

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

const Level& current() {
  return FUSED_CNN_PICK(engine_level);
}

const Kernels& kernels(DType dtype) {
  return dtype == DType::bf16 ? current().bf16 : current().f32;
}

int64_t element_size(DType dtype) {  // as the kernels read it
  return kernels(dtype).k_step > 1 ? 2 : 4;
}

thread_local Workspace workspace;

Reduction reduction(const ConvShape& s, int64_t step) {
  const bool fold = s.kernel.w > 1 && (s.dilation.w == 1 || step == kMatrixStep) && s.C < 16;
  const int64_t run = fold ? s.kernel.w * s.C : s.C;
  return {.taps_h = s.kernel.h,
          .taps_w = fold ? 1 : s.kernel.w,
          .run = run,
          .padded = round_up(std::max<int64_t>(run, 1), step),
          .fold = fold};
}

// Costs of a 3 x 3 convolution in multiply-adds of vectors per pair of channels. The transforms' share, and 15% for
// sums that pass through memory, measured on Zen 4 (2 cores, 2026-11-25).
double direct_cost(const Plan& plan, int64_t pixels) {
  return 9.0 * pixels / kernels(plan.dtype).k_step;
}

int64_t all_out_channels(const ConvShape& s) {
  return std::accumulate(s.out_channels, s.out_channels + s.destinations, int64_t{0});
}

int64_t winograd_tiles(const ConvShape& s) {  // of the whole call, those that overhang the images included
  return s.batch * ceil_div(s.out.h, 2) * ceil_div(s.out.w, 4);
}

double winograd_cost(const ConvShape& s, int64_t tiles) {
  const int64_t out = all_out_channels(s);
  return kWinogradPositions * tiles * (1.15 + 9.0 / s.C + 7.0 / out);
}

// Whether transformed weights are packed as well. In bfloat16 only small ones: they are float, 24 for 9, and the layers
// with large ones have images so small that it does not pay.
bool has_winograd(const Plan& plan) {
  const ConvShape& s = plan.shape;
  if (s.kernel.h != 3 || s.kernel.w != 3 || s.stride.h * s.stride.w != 1 || s.dilation.h * s.dilation.w != 1)
    return false;
  if (plan.matrix || (plan.dtype == DType::bf16 && plan.vectors * current().lanes * s.C > 1 << 16)) return false;
  return winograd_cost(s, 1) < direct_cost(plan, 8);
}

// Whether this call uses them: tiles that overhang small images are wasted, and with few pixels reading the weights is
// what takes the time (a thread reads about 3 bytes a cycle). What is added in place could not be added again.
bool winograd_pays(const Plan& plan, bool in_place) {
  const ConvShape& s = plan.shape;
  if (plan.winograd.panel_bytes == 0 || in_place) return false;
  const double per_byte = current().lanes / 3.0;
  return winograd_cost(s, winograd_tiles(s)) + kWinogradPositions * 4 * per_byte <
         direct_cost(plan, s.batch * plan.out_h * plan.out_w) + 9 * element_size(plan.dtype) * per_byte;
}

// The part of the plan that all calls share: what the packed layout depends on, and the size of the output.
Plan plan_weight(const ConvShape& shape, DType dtype, const void* packed) {
  const int64_t lanes = current().lanes, step = kernels(dtype).k_step;
  Plan plan{};
  plan.shape = shape;
  plan.dtype = dtype;
  plan.out_h = shape.out.h;
  plan.out_w = shape.out.w;
  plan.reduction = reduction(shape, step);
  plan.matrix = step == kMatrixStep;
  for (int d = 0; d < shape.destinations; d++)
    plan.vector_of[d + 1] = plan.vector_of[d] + ceil_div(shape.out_channels[d], lanes);
  plan.vectors = plan.vector_of[shape.destinations];
  plan.panels = ceil_div(plan.vectors, kPanelVectors);
  const Reduction& r = plan.reduction;
  plan.panel_bytes = r.taps_h * r.taps_w * r.padded * kPanelVectors * lanes * element_size(dtype);
  plan.bias_bytes = round_up(plan.vectors * lanes * 4, kCacheLine);
  plan.direct_bytes = plan.packed_bytes = plan.bias_bytes + ceil_div(plan.panel_bytes * plan.vectors, kPanelVectors);
  if (has_winograd(plan)) {
    plan.winograd.panel_bytes = kWinogradPositions * shape.C * kPanelVectors * lanes * 4;
    plan.direct_bytes = round_up(plan.direct_bytes, kCacheLine);
    plan.packed_bytes = plan.direct_bytes + ceil_div(plan.winograd.panel_bytes * plan.vectors, kPanelVectors);
  }
  if (packed == nullptr) return plan;  // it is asked for sizes
  plan.args.packed = packed;
  plan.bias = static_cast<const float*>(packed);
  plan.weight = static_cast<const char*>(packed) + plan.bias_bytes;
  if (plan.winograd.panel_bytes > 0) plan.winograd.weight = static_cast<const char*>(packed) + plan.direct_bytes;
  return plan;
}

// Blocks: enough pixels to use a weight panel several times while it is in cache, few enough that their input stays in
// L2 beside it, and with the groups of panels enough items to keep all threads busy to the end.
void plan_blocks(Plan& plan, int threads) {
  ConvShape& s = plan.shape;
  const Reduction& r = plan.reduction;
  const int64_t size = element_size(plan.dtype), tile = plan.matrix ? kMatrixPixels : current().tile_pixels;
  const bool pointwise = s.kernel.h * s.kernel.w == 1;
  const bool flat = pointwise && s.stride.h * s.stride.w == 1 && s.pad.h + s.pad.w == 0;
  if (flat) {
    s.W = plan.out_w = s.N * s.H * s.W;
    s.N = s.H = plan.out_h = 1;
  }
  plan.step_h = s.kernel.h == 1 ? 1 : s.stride.h;
  plan.step_w = s.kernel.w == 1 ? 1 : s.stride.w;

  // Tile pixels 2 KiB (or a multiple) apart share a few L1 sets, and evict each other at every k.
  const int64_t x_size = plan.dtype == DType::bf16 ? 2 : 4;
  const bool aliased = s.stride.w * plan.args.x.pitch * size % 4096 == 0;
  plan.gather = s.pad.h || s.pad.w || size != x_size || aliased || (r.fold && plan.args.x.pitch != s.C);
  if (plan.gather) {
    const int64_t lines = ceil_div(s.C * size, kCacheLine) | 1;  // odd, for the same reason
    plan.pitch = r.fold ? s.C : lines * kCacheLine / size;
  } else {
    plan.pitch = plan.args.x.pitch;
    plan.step_h = s.stride.h;
    plan.step_w = s.stride.w;
  }

  const int64_t reach_h = (s.kernel.h - 1) * s.dilation.h + 1, reach_w = (s.kernel.w - 1) * s.dilation.w + 1;
  plan.phases_h = plan.phases_w = 1;
  int64_t wanted = 16 * tile;  // pixels per block
  if (plan.matrix) {
    // The sums are so fast that copying the rows which two blocks share shows; a pointwise convolution shares none.
    wanted = (pointwise ? 8 : 64) * tile;
    plan.gather = r.fold || r.run < r.padded || s.pad.h || s.pad.w || s.stride.h * s.stride.w > 1;
    plan.pitch = plan.gather ? r.padded : plan.args.x.pitch;
    plan.phases_h = std::min(s.stride.h, reach_h);
    plan.phases_w = r.fold ? 1 : std::min(s.stride.w, reach_w);
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
      plan.in_h = plan.block_h + (reach_h - 1) / s.stride.h;
      plan.in_w = plan.block_w + (r.fold ? 0 : (reach_w - 1) / s.stride.w);
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
      const int64_t y = h * s.dilation.h, x = w * s.dilation.w;
      const int64_t image = y % s.stride.h * plan.phases_w + x % s.stride.w;
      offsets.push_back(((image * plan.in_h + y / s.stride.h) * plan.in_w + x / s.stride.w) * plan.pitch * 2);
    }
  }
  return offsets;
}

// Blocks of as many tiles as make two calls of the microkernel: a position's weights then serve twice from L1.
void plan_winograd(Plan& plan, int threads) {
  const ConvShape& s = plan.shape;
  Winograd& wg = plan.winograd;
  wg.tiles_y = ceil_div(plan.out_h, 2);
  wg.tiles_x = ceil_div(plan.out_w, 4);
  wg.tiles = s.N * wg.tiles_y * wg.tiles_x;
  wg.pitch = (ceil_div(s.C * 4, kCacheLine) | 1) * kCacheLine / 4;  // odd: see plan_blocks
  wg.blocks = ceil_div(wg.tiles, 2 * current().tile_pixels);
  wg.block_tiles = ceil_div(wg.tiles, wg.blocks);
  plan.groups = threads == 1 ? 1 : std::min(plan.panels, ceil_div(12 * threads, wg.blocks));
  plan.items = wg.blocks * plan.groups;
}

// Threads take items as they come free, so that one delayed by other work on the machine does not delay the call.
void run_items(Plan& plan, void (*run_item)(const Plan&, int64_t, Scratch&), int64_t scratch_bytes, int threads) {
  plan.workers = std::min<int64_t>(threads, plan.items);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, plan.workers, 1, [&](int64_t, int64_t) {
    Scratch scratch{.data = workspace.at_least(scratch_bytes), .block = -1};
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < plan.items;)
      run_item(plan, item, scratch);
  });
}

}  // namespace

int64_t packed_weight_bytes(const ConvShape& shape, DType dtype) {
  return plan_weight(shape, dtype, nullptr).packed_bytes;
}

ConvWork conv_work(const ConvShape& s, DType dtype, bool in_place) {
  const Plan plan = plan_weight(s, dtype, nullptr);
  const int64_t pairs = s.C * all_out_channels(s);
  if (winograd_pays(plan, in_place)) {
    return {.packed_bytes = plan.bias_bytes + plan.packed_bytes - plan.direct_bytes,
            .multiply_adds = kWinogradPositions * winograd_tiles(s) * pairs};
  }
  return {.packed_bytes = plan.direct_bytes,
          .multiply_adds = s.batch * s.out.h * s.out.w * s.kernel.h * s.kernel.w * pairs};
}

void pack_weight(const ConvShape& shape, DType dtype, const void* const* weight, const float* const* bias,
                 void* packed) {
  const Plan plan = plan_weight(shape, dtype, packed);
  // Lanes past a destination's last channel, steps past a run, and what lies between the parts: equal weights are then
  // packed into equal bytes.
  std::memset(packed, 0, plan.packed_bytes);
  const auto pack_panel = kernels(dtype).pack_panel;
  torch::stable::parallel_for(0, plan.panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; panel++) pack_panel(plan, weight, bias, panel);
  });
}

void conv_forward(const ConvShape& shape, DType dtype, const ConvArgs& args) {
  Plan plan = plan_weight(shape, dtype, args.packed);
  plan.args = args;
  if (shape.N * plan.out_h * plan.out_w <= 0) return;
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  bool in_place = false;
  for (const Destination& to : args.destination) in_place |= to.out.data != nullptr && to.residual.data == to.out.data;
  if (winograd_pays(plan, in_place)) {
    int nonfinite = 0;
    plan.winograd.nonfinite = &nonfinite;
    plan_winograd(plan, threads);
    const int64_t floats_per_tile = plan.winograd.pitch + kPanelVectors * current().lanes;
    run_items(plan, kernels(dtype).run_item_winograd,
              kWinogradPositions * plan.winograd.block_tiles * floats_per_tile * 4, threads);
    if (!nonfinite) return;
  }
  plan_blocks(plan, threads);
  std::vector<int64_t> offsets;
  if (plan.matrix) offsets = tap_offsets(plan);
  plan.tap_offset = offsets.data();
  plan.items = plan.shape.N * plan.blocks_y * plan.blocks_x * plan.groups;
  const int64_t pixels = plan.phases_h * plan.phases_w * plan.in_h * plan.in_w;
  const int64_t scratch = plan.gather ? pixels * plan.pitch * element_size(dtype) : 0;
  FUSED_CNN_CHECK(scratch <= kMostScratch, "a convolution whose kernel reaches over ", plan.in_h, " x ", plan.in_w,
                  " pixels of ", shape.C, " channels would need ", scratch,
                  " bytes of scratch memory a thread, not at most ", kMostScratch);
  run_items(plan, kernels(dtype).run_item, scratch, threads);
}

void max_pool(const Window& window, DType dtype, Rows x, void* out) {
  const int64_t in_window = std::min(window.kernel.h, window.H) * std::min(window.kernel.w, window.W);
  const int64_t per_row = window.out.w * window.C * in_window;
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, per_row));
  const auto pool_row = kernels(dtype).max_pool_row;
  torch::stable::parallel_for(0, window.N * window.out.h, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) pool_row(window, x, out, row);
  });
}

void max_pool_backward(const Window& window, DType dtype, Rows x, const void* grad_out, void* grad_x) {
  constexpr int64_t kItemsPerThread = 4, kBandRows = 4, kRingBytes = 192 << 10;  // a ring lies in L2
  const int64_t lanes = current().lanes, threads = torch::stable::get_num_threads();
  const int64_t ring_pixels = std::min(window.dilation.h * (window.kernel.h - 1) + 1, window.H) * window.W;
  const int64_t vector_bytes = std::max<int64_t>(1, ring_pixels * lanes * sizeof(float));
  const int64_t vectors = std::clamp<int64_t>(kRingBytes / vector_bytes, 1, ceil_div(window.C, lanes));
  const int64_t channels = vectors * lanes, groups = ceil_div(window.C, channels), parts = window.N * groups;
  const int64_t bands = threads == 1 ? 1
                                     : std::clamp<int64_t>(ceil_div(kItemsPerThread * threads, parts), 1,
                                                           std::max<int64_t>(1, window.out.h / kBandRows));
  const auto pool_band = kernels(dtype).max_pool_backward;
  torch::stable::parallel_for(0, parts * bands, 1, [&](int64_t begin, int64_t end) {
    float* ring = static_cast<float*>(workspace.at_least(ring_pixels * channels * sizeof(float)));
    for (int64_t item = begin; item < end; item++) {
      const int64_t part = item / groups, band = part % bands;
      const PoolBand piece{.n = part / bands,
                           .first = band * window.out.h / bands,
                           .last = (band + 1) * window.out.h / bands,
                           .c = item % groups * channels,
                           .vectors = vectors};
      pool_band(window, x, grad_out, grad_x, piece, ring);
    }
  });
}

}  // namespace fused_cnn::engine
