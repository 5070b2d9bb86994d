"""The convolution that the Triton rooms share: an implicit GEMM over channels_last pixels, persistent, with everything
in its epilogue.

    out[m, n] = relu(sum over taps and c of x[pixel(m, tap), c] * weight[n, tap, c] + bias[n] + residual[m, n])

A row m is a pixel of the result. Its columns may go to three destinations, each with a row pitch of its own: a channel
slice of a wider tensor, or a buffer. An operand that is read once a tap comes through a tensor descriptor (TMA) where
it is a plain matrix and the hardware has them; else, and for strides and windows, through pointers. Reads x about taps
times (from cache), weight and residual once, and writes each destination once.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._candidates import Candidate, pick
from ._conv import out_sides
from ._triton import launch, pixels, processors, relu

MAX_DESTINATIONS = 3
PRECISION = {"16-bit": "tf32", "tf32": "tf32", "ieee": "ieee"}  # tl.dot's input_precision, which is about float32 alone


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """The tile's row and column block: GROUP row blocks share the weights of a column block while they are in L2."""
    width = GROUP * tiles_n
    first = tile // width * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    return first + tile % width % rows, tile % width // rows


@triton.jit
def load_window_max(x_ptr, image, h0, w0, height, width, pitch, c, channels, valid):
    """max over 3 x 3 pixels around (h0 + 1, w0 + 1), those outside the image left out; NaN wins, as in PyTorch."""
    best = tl.full((image.shape[0], c.shape[0]), float("-inf"), x_ptr.dtype.element_ty)
    for tap in tl.static_range(9):
        h, w = h0 + tap // 3, w0 + tap % 3
        inside = valid & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        at = ((image * height + h) * width + w).to(tl.int64) * pitch
        v = tl.load(
            x_ptr + at[:, None] + c[None, :], mask=inside[:, None] & (c < channels)[None, :], other=float("-inf")
        )
        best = tl.where((v > best) | (v != v), v, best)
    return tl.where(valid[:, None] & (c < channels)[None, :], best, 0.0)


@triton.jit
def store_columns(out_ptr, pitch, rows, cols, begin, end, valid_rows, values):
    """The columns of a tile that belong to one destination."""
    mask = valid_rows[:, None] & ((cols >= begin) & (cols < end))[None, :]
    at = rows.to(tl.int64)[:, None] * pitch + (cols - begin)[None, :]
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def conv_fwd_kernel(
    x, weight, bias_ptr, residual_ptr, out0_ptr, out1_ptr, out2_ptr,
    rows, channels, columns, end0, end1,
    height, width, out_h, out_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    x_pitch, residual_pitch, pitch0, pitch1, pitch2, kernel_w, taps,
    DENSE: tl.constexpr, POOL: tl.constexpr, TMA: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, DESTINATIONS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n, blocks_k = tl.cdiv(rows, BM), tl.cdiv(columns, BN), tl.cdiv(channels, BK)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = tile_of(tile, tiles_m, tiles_n, GROUP)
        m, n = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
        valid_m, valid_n = m < rows, n < columns
        if not DENSE:
            image, pixel = m // (out_h * out_w), m % (out_h * out_w)
            h0, w0 = pixel // out_w * stride_h - pad_h, pixel % out_w * stride_w - pad_w
        acc = tl.zeros((BM, BN), tl.float32)
        for step in tl.range(0, taps * blocks_k):
            tap, c = step // blocks_k, step % blocks_k * BK + tl.arange(0, BK)
            if TMA:
                a = x.load([pid_m * BM, step * BK])
                b = weight.load([pid_n * BN, step * BK])
            else:
                if DENSE:
                    at = m.to(tl.int64) * x_pitch
                    a = tl.load(
                        x + at[:, None] + c[None, :], mask=valid_m[:, None] & (c < channels)[None, :], other=0.0
                    )
                elif POOL:
                    a = load_window_max(x, image, h0, w0, height, width, x_pitch, c, channels, valid_m)
                else:
                    h, w = h0 + tap // kernel_w * dilation_h, w0 + tap % kernel_w * dilation_w
                    inside = valid_m & (h >= 0) & (h < height) & (w >= 0) & (w < width)
                    at = ((image * height + h) * width + w).to(tl.int64) * x_pitch
                    a = tl.load(x + at[:, None] + c[None, :], mask=inside[:, None] & (c < channels)[None, :], other=0.0)
                at_weight = n.to(tl.int64)[:, None] * (taps * channels) + (tap * channels + c)[None, :]
                b = tl.load(weight + at_weight, mask=valid_n[:, None] & (c < channels)[None, :], other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        if BIAS:
            acc += tl.load(bias_ptr + n, mask=valid_n, other=0.0).to(tl.float32)[None, :]
        if RESIDUAL:
            at = m.to(tl.int64)[:, None] * residual_pitch + n[None, :]
            acc += tl.load(residual_ptr + at, mask=valid_m[:, None] & valid_n[None, :], other=0.0).to(tl.float32)
        if RELU:
            acc = relu(acc)
        store_columns(out0_ptr, pitch0, m, n, 0, end0, valid_m, acc)
        if DESTINATIONS > 1:
            store_columns(out1_ptr, pitch1, m, n, end0, end1, valid_m, acc)
        if DESTINATIONS > 2:
            store_columns(out2_ptr, pitch2, m, n, end1, columns, valid_m, acc)


def products(dtype: torch.dtype) -> str:
    """How products are taken: of 16-bit operands, or of float32 ones as PyTorch's setting for convolutions says."""
    if dtype != torch.float32:
        return "16-bit"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


class Tiles(NamedTuple):
    """A kernel's configuration: rows, columns and K of a tile, warps, and stages of the software pipeline."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


def _suits(tiles: Tiles, rows: int, columns: int, programs: int) -> bool:
    """Tiles not much wider than the columns that still give most multiprocessors one."""
    narrow = max(32, triton.next_power_of_2(columns)) >= tiles.BN
    return narrow and triton.cdiv(rows, tiles.BM) * triton.cdiv(columns, tiles.BN) >= programs * 3 // 4


def _candidates(*tiles: Tiles) -> list[Candidate[Tiles]]:
    return [Candidate(t, when=partial(_suits, t)) for t in tiles]


TILES = {  # by products(); the largest first
    "16-bit": _candidates(
        Tiles(128, 128, 64, 8, 4), Tiles(128, 64, 64, 4, 4), Tiles(128, 32, 64, 4, 4), Tiles(64, 64, 64, 4, 4),
        Tiles(64, 32, 64, 4, 4),
    ),
    "tf32": _candidates(
        Tiles(128, 64, 32, 8, 3), Tiles(128, 32, 32, 4, 3), Tiles(64, 64, 32, 4, 3), Tiles(64, 32, 32, 8, 3)
    ),
    # No matrix units: larger ones spill.
    "ieee": _candidates(Tiles(64, 64, 16, 8, 3), Tiles(64, 32, 16, 8, 3), Tiles(32, 32, 16, 8, 3)),
}  # fmt: skip
POOL_TILES = [Candidate(Tiles(64, 64, 32, 4, 1))]  # nine loads a step hide their latency themselves


class Geometry(NamedTuple):
    """conv2d's, (h, w) each. With `pool` the window is a 3 x 3 max pool's, and a 1x1 convolution follows it."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    pool: bool = False


def weight_rows(weight: Tensor) -> Tensor:
    """(out, in, kh, kw) as (out, kh, kw, in) in memory: itself, seen otherwise, where it is channels_last."""
    return weight.permute(0, 2, 3, 1).contiguous()


def described(t: Tensor, rows: int, columns: int, pitch: int, block: Sequence[int]) -> TensorDescriptor | None:
    """A TMA descriptor of `rows` x `columns` elements, or None where the hardware or the alignment does not allow
    one."""
    size = t.element_size()
    if t.device.type == "cuda" and torch.cuda.get_device_capability(t.device)[0] < 9:
        return None
    if t.data_ptr() % 16 or pitch * size % 16 or rows == 0:
        return None
    return TensorDescriptor(t, [rows, columns], [pitch, 1], list(block))


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    relu: bool,
    outs: Sequence[Tensor],
) -> None:
    """One launch. `weight` is (columns, kernel_h, kernel_w, channels) in memory; `outs` are the destinations, rows of
    pixels, whose channels fill the weight's rows in order."""
    n, channels, height, width = x.shape
    columns = weight.size(0)
    out_h, out_w = out_sides(x, *geometry[:4])
    rows, taps = n * out_h * out_w, weight.size(1) * weight.size(2)
    x, x_pitch = pixels(x)
    residual, residual_pitch = (x, 0) if residual is None else pixels(residual)
    bias_at = x if bias is None else bias.contiguous()
    dense = geometry == Geometry((1, 1))
    ends = [*accumulate(out.size(1) for out in outs), columns]
    destinations = [*outs, outs[0], outs[0]][:MAX_DESTINATIONS]

    def run(tiles: Tiles) -> None:
        sources: tuple[Any, Any] = (x, weight)
        if dense:
            descriptors = (
                described(x, rows, channels, x_pitch, (tiles.BM, tiles.BK)),
                described(weight, columns, channels, channels, (tiles.BN, tiles.BK)),
            )
            sources = sources if None in descriptors else descriptors
        programs = min(triton.cdiv(rows, tiles.BM) * triton.cdiv(columns, tiles.BN), processors(x.device))
        launch(
            conv_fwd_kernel, (programs,), *sources, bias_at, residual, *destinations, rows, channels, columns,
            *ends[:2], height, width, out_h, out_w, *geometry.stride, *geometry.padding, *geometry.dilation,
            x_pitch, residual_pitch, *(out.stride(3) for out in destinations), geometry.kernel[1], taps,
            DENSE=dense, POOL=geometry.pool, TMA=sources[0] is not x, BIAS=bias is not None,
            RESIDUAL=residual_pitch > 0, RELU=relu, DESTINATIONS=len(outs), PRECISION=PRECISION[kind], GROUP=8,
            **tiles._asdict(),
        )  # fmt: skip

    kind = products(x.dtype)
    candidates = POOL_TILES if geometry.pool else TILES[kind]
    window = (*geometry.kernel, *geometry.stride, geometry.pool)
    key = (kind, rows, columns, channels, *window, len(outs), residual_pitch > 0)
    run(pick("conv_fwd_kernel", key, candidates, run, x.device, (rows, columns, processors(x.device))))
