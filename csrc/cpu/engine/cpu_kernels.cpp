// Everything of the engine that is compiled once per instruction set (see README.md): packing, the gathering of a
// block's input, and the loop over the tiles of an item; the included files hold the rest. Of the standard library
// nothing but memcpy and memset is used, and all but the table of functions at the end has internal linkage.
#include "cpu/engine/conv_plan.h"
#include "cpu/simd.h"
#include "shared/relu.h"

namespace fused_cnn::FUSED_CNN_LEVEL {
namespace {

using namespace engine;

using Vector = Vec<float>;
constexpr int kFloats = kLanes<float>;

// Output pixels per tile: a tile's sums are twice that many vectors, beside 2 weights and 1 input.
#if defined(__AVX512F__)
constexpr int kTilePixels = 14;  // of 32 registers
#elif defined(__x86_64__)
constexpr int kTilePixels = 6;  // of 16 registers
#else
constexpr int kTilePixels = 12;  // of 32 registers on aarch64
#endif

#if defined(__AMX_BF16__)
constexpr int kBf16Step = kMatrixStep;
#elif defined(__AVX512BF16__)
constexpr int kBf16Step = 2;
#else
constexpr int kBf16Step = 1;
#endif

int64_t vectors_of(const Plan& plan, int64_t panel) {
  return min(plan.vectors - panel * kPanelVectors, kPanelVectors);
}

// The output channels of a vector of the packed weight: `channels` of a destination's, from `first` on.
struct PackedVector {
  int destination;
  int64_t first, channels;
};

PackedVector packed_vector(const Plan& plan, int64_t vector) {
  int d = 0;
  while (vector >= plan.vector_of[d + 1]) d++;
  const int64_t first = (vector - plan.vector_of[d]) * kFloats;
  return {.destination = d, .first = first, .channels = min(plan.shape.out_channels[d] - first, kFloats)};
}

#include "cpu/engine/conv_tile.inc"
#include "cpu/engine/max_pool.inc"

// packed: bias, then for each panel [taps_h][taps_w][padded run / P / rows][vectors][rows][lanes][P], with P
// consecutive k side by side for products of P elements, and `rows` of those together for matrix units (otherwise 1).
// Lanes past a destination's last channel, and k past the run, are zero.
template <class Product, class T>
void pack_direct(const Plan& plan, const void* const* weight, const float* const* bias, int64_t panel) {
  constexpr int P = Product::kPerStep, kRows = Product::kRows;
  using Element = typename Product::Element;
  const ConvShape& s = plan.shape;
  const Reduction& r = plan.reduction;
  const int64_t steps = r.padded / P, spatial = s.kernel.h * s.kernel.w, vectors = vectors_of(plan, panel);
  float* packed_bias = (float*)plan.bias + panel * kPanelVectors * kFloats;  // the plan is of memory to be written here
  Element* packed_weight = (Element*)((char*)plan.weight + panel * plan.panel_bytes);

  for (int64_t v = 0; v < vectors; v++) {
    const PackedVector of = packed_vector(plan, panel * kPanelVectors + v);
    const T* from = (const T*)weight[of.destination] + of.first * s.C * spatial;
    for (int64_t lane = 0; lane < of.channels && bias[of.destination]; lane++)
      packed_bias[v * kFloats + lane] = bias[of.destination][of.first + lane];
    for (int64_t c = 0; c < s.C; c++) {
      for (int64_t tap = 0; tap < spatial; tap++) {
        const int64_t in_run = r.fold ? tap % s.kernel.w * s.C + c : c;
        const int64_t step = (r.fold ? tap / s.kernel.w : tap) * steps + in_run / P;
        const int64_t row = (step / kRows * vectors + v) * kRows + step % kRows;
        Element* to = packed_weight + row * kFloats * P + in_run % P;
        for (int64_t lane = 0; lane < of.channels; lane++)
          copy_elements(to + lane * P, from + (lane * s.C + c) * spatial + tap, 1);
      }
    }
  }
}

// Scratch pixel (j, i) is input pixel (y0 + j * stride_y, x0 + i * stride_x), or zero outside the image.
template <class T, class U>
void gather(const Plan& plan, int64_t n, int64_t y0, int64_t x0, int64_t in_h, U* scratch) {
  const ConvShape& s = plan.shape;
  const int64_t stride_y = s.stride.h / plan.step_h, stride_x = s.stride.w / plan.step_w, row = plan.in_w * plan.pitch;
  const int64_t left = x0 < 0 ? (-x0 + stride_x - 1) / stride_x : 0;
  const int64_t right = max(left, min((s.W - x0 + stride_x - 1) / stride_x, plan.in_w));  // first column past the image
  for (int64_t j = 0; j < in_h; j++) {
    const int64_t y = y0 + j * stride_y;
    U* to = scratch + j * row;
    if (y < 0 || y >= s.H || left >= plan.in_w) {
      memset(to, 0, row * sizeof(U));
      continue;
    }
    const T* from = plan.args.x.at<const T>((n * s.H + y) * s.W + x0 + left * stride_x);
    memset(to, 0, left * plan.pitch * sizeof(U));
    if (stride_x == 1 && plan.args.x.pitch == s.C && plan.pitch == s.C) {
      copy_elements(to + left * s.C, from, (right - left) * s.C);
    } else {
      for (int64_t i = left; i < right; i++)
        copy_elements(to + i * plan.pitch, from + (i - left) * stride_x * plan.args.x.pitch, s.C);
    }
    memset(to + right * plan.pitch, 0, (plan.in_w - right) * plan.pitch * sizeof(U));
  }
}

// The output pixels of an item, and the input pixel that the first tap meets at the first of them.
struct Block {
  int64_t index, n, oy, ox, rows, columns, y0, x0;
  int64_t first_panel, last_panel;
  int64_t next_group;  // of the thread's next item
};

Block block_of(const Plan& plan, int64_t item) {
  const ConvShape& s = plan.shape;
  Block b;
  const int64_t group = item % plan.groups, next = item + plan.workers;
  b.index = item / plan.groups;
  b.n = b.index / plan.blocks_x / plan.blocks_y;
  b.oy = b.index / plan.blocks_x % plan.blocks_y * plan.block_h;
  b.ox = b.index % plan.blocks_x * plan.block_w;
  b.rows = min(plan.out_h - b.oy, plan.block_h);
  b.columns = min(plan.out_w - b.ox, plan.block_w);
  b.y0 = b.oy * s.stride.h - s.pad.h;
  b.x0 = b.ox * s.stride.w - s.pad.w;
  b.first_panel = group * plan.panels / plan.groups;
  b.last_panel = (group + 1) * plan.panels / plan.groups;
  b.next_group = next < plan.items ? next % plan.groups : group;
  return b;
}

// The panel whose weights are fetched while the item's tiles meet panel p, or -1. Weights come from memory on every
// call of a network (they are larger than the caches), so the panels that follow are fetched a piece per tile: this
// item's, then those of the thread's next item.
int64_t panel_ahead(const Plan& plan, int64_t item, const Block& b, int64_t p) {
  const bool next_weights = b.next_group != item % plan.groups, last = p + 1 == b.last_panel;
  const int64_t next_panel = b.next_group * plan.panels / plan.groups;
  if (plan.tiles_first) return next_weights ? next_panel + (p - b.first_panel) : -1;
  return !last ? p + 1 : next_weights ? next_panel : -1;
}

// run(panel, tile) for one block of output pixels by one group of panels. Weights that fit in L2 stay there while the
// tiles go by, each meeting every panel at once, so that input and output stream through memory in order. Otherwise
// panels are the outer loop: one panel (128 bytes * K) stays in L2 while every tile of the block, whose input is there
// as well, goes by.
template <class Run>
FUSED_CNN_INLINE void for_each_tile(const Plan& plan, const Block& b, int64_t tiles, const Run& run) {
  if (plan.tiles_first) {
    for (int64_t t = 0; t < tiles; t++)
      for (int64_t p = b.first_panel; p < b.last_panel; p++) run(p, t);
  } else {
    for (int64_t p = b.first_panel; p < b.last_panel; p++)
      for (int64_t t = 0; t < tiles; t++) run(p, t);
  }
}

template <class Product, class T>
void run_item(const Plan& plan, int64_t item, Scratch& scratch) {
  using Element = typename Product::Element;
  const ConvShape& s = plan.shape;
  const Block b = block_of(plan, item);

  const Element* x = (const Element*)scratch.data;
  int64_t row_pitch = plan.in_w * plan.pitch;
  if (!plan.gather) {
    x = (const Element*)plan.args.x.data + ((b.n * s.H + b.y0) * s.W + b.x0) * plan.pitch;
    row_pitch = s.W * plan.pitch;
  } else if (scratch.block != b.index) {
    const int64_t in_h = (b.rows - 1) * plan.step_h + (s.kernel.h - 1) * s.dilation.h + 1;
    gather<T>(plan, b.n, b.y0, b.x0, in_h, (Element*)scratch.data);
    scratch.block = b.index;
  }

  Tile tile;
  constexpr int64_t kSize = sizeof(Element);
  tile.step = plan.step_w * plan.pitch * kSize;
  tile.taps_h = plan.reduction.taps_h;
  tile.taps_w = plan.reduction.taps_w;
  tile.run = plan.reduction.run;
  tile.tap_h_step = s.dilation.h * row_pitch * kSize;
  tile.tap_w_step = s.dilation.w * plan.pitch * kSize;
  tile.H = s.H;
  tile.dilation_h = s.dilation.h;
  const int64_t row_step = plan.step_h * row_pitch * kSize;
  const int64_t first_pixel = (b.n * plan.out_h + b.oy) * plan.out_w + b.ox;

  // A tile is part of one row, or two whole rows where these are short. Parts are as equal as can be: 15 is 8 and 7.
  const bool two_rows = b.columns * 2 <= kTilePixels;
  const int64_t parts = (b.columns + kTilePixels - 1) / kTilePixels;
  const int64_t tiles = two_rows ? (b.rows + 1) / 2 : b.rows * parts;

  const auto run = [&](int64_t p, int64_t t) {
    const int64_t vectors = vectors_of(plan, p);
    tile.weight = (const char*)plan.weight + p * plan.panel_bytes;
    tile.bias = plan.bias + p * kPanelVectors * kFloats;
    for (int64_t j = 0; j < vectors; j++) tile.output[j] = output_of<T>(plan, p * kPanelVectors + j);

    const int64_t y = two_rows ? 2 * t : t / parts, part = two_rows ? 0 : t % parts;
    const bool pair = two_rows && y + 1 < b.rows;
    const int64_t begin = part * b.columns / parts, pixels = (part + 1) * b.columns / parts - begin;
    const int64_t half = (pixels + 1) / 2;
    tile.x[0] = (const char*)x + y * row_step + begin * tile.step;
    tile.x[1] = tile.x[0] + (pair ? row_step : half * tile.step);
    const int64_t ahead = panel_ahead(plan, item, b, p);
    if (ahead >= 0) {
      const int64_t steps = tile.taps_h * tile.taps_w * (tile.run / Product::kPerStep);
      tile.ahead = (const char*)plan.weight + ahead * plan.panel_bytes + t * plan.panel_bytes / tiles;
      tile.ahead_step = plan.panel_bytes / tiles / max(steps, 1);
    } else {
      const bool streams = !plan.gather && p == b.first_panel;  // the input comes from memory, in order
      tile.ahead = streams ? tile.x[0] + pixels * tile.step : tile.x[0];
      tile.ahead_step = streams ? 64 : 0;
    }
    tile.row[0] = b.y0 + y * s.stride.h;
    tile.row[1] = tile.row[0] + (pair ? s.stride.h : 0);
    tile.out_pixel[0] = first_pixel + y * plan.out_w + begin;
    tile.out_pixel[1] = tile.out_pixel[0] + (pair ? plan.out_w : half);
    tile_function<Product, T>(pair ? 2 * pixels : pixels, vectors)(tile);
  };
  for_each_tile(plan, b, tiles, run);
}

#include "cpu/engine/conv_winograd.inc"
#if defined(__AMX_BF16__)
#include "cpu/engine/conv_amx.inc"
#endif

template <class Product, class T>
void pack_panel(const Plan& plan, const void* const* weight, const float* const* bias, int64_t panel) {
  pack_direct<Product, T>(plan, weight, bias, panel);
  if (plan.winograd.weight != nullptr) pack_winograd<T>(plan, weight, panel);
}

template <class Product, class T>
constexpr Kernels kernels_of(int k_step, void (*run_item)(const Plan&, int64_t, Scratch&)) {
  return {.k_step = k_step,
          .pack_panel = pack_panel<Product, T>,
          .run_item = run_item,
          .run_item_winograd = run_item_winograd<T>,
          .max_pool_row = max_pool_row<T>,
          .max_pool_backward = max_pool_backward<T>};
}

#if defined(__AVX512BF16__)
using Bf16Product = PairProduct;
#else
using Bf16Product = FloatProduct;
#endif
#if defined(__AMX_BF16__)
constexpr auto run_item_bf16 = run_item_amx;
#else
constexpr auto run_item_bf16 = run_item<Bf16Product, bf16_t>;
#endif

}  // namespace

extern const Level engine_level = {.lanes = kFloats,
                                   .tile_pixels = kTilePixels,
                                   .f32 = kernels_of<FloatProduct, float>(1, run_item<FloatProduct, float>),
                                   .bf16 = kernels_of<Bf16Product, bf16_t>(kBf16Step, run_item_bf16)};

}  // namespace fused_cnn::FUSED_CNN_LEVEL
