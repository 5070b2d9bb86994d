"""What every room's triton.py shares: tiles of pixels by channels, ReLU as PyTorch defines it, masked sums."""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CHANNELS = 32, 64  # of a tile of the kernels that only stream
TILE = {"BM": ROWS, "BC": CHANNELS}
MAX_PIXELS = 2**31 - 2**16  # a pixel's number is a 32-bit integer, also in the tiles that overhang the last one
MAX_CHANNELS = 2**21  # 64 a program on an axis of the grid, which has 65535


def check_size(n: int, channels: int, height: int, width: int) -> None:
    """What the kernels can number. Offsets in memory, pixels times channels, are 64-bit."""
    if n * height * width > MAX_PIXELS or channels > MAX_CHANNELS:
        raise ValueError(
            f"Triton's kernels take at most {MAX_PIXELS} pixels (N * H * W) of {MAX_CHANNELS} channels, "
            f"got shape {(n, channels, height, width)}"
        )


def pixels(t: Tensor) -> tuple[Tensor, int]:
    """An activation as rows of pixels with adjacent channels, and the elements from one row to the next: t itself where
    its pixels are evenly spaced, else a channels_last copy."""
    check_size(*t.shape)
    c, h, w = t.shape[1:]
    pitch = t.stride(3)
    if t.stride() != (pitch * w * h, 1, pitch * w, pitch) or pitch < c:
        return empty_pixels(t, c, h, w).copy_(t), c
    return t, pitch


def empty_pixels(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised channels_last activation for `like`'s images."""
    shape = (like.size(0), channels, height, width)
    check_size(*shape)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


@lru_cache
def processors(device: torch.device) -> int:
    """How many programs fill the device: its multiprocessors; a few in the interpreter."""
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def tiles(rows: int, channels: int) -> tuple[int, int]:
    """The grid of one program a tile."""
    return triton.cdiv(rows, ROWS), triton.cdiv(channels, CHANNELS)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """On the device of the first argument, a tensor or a descriptor of one; nothing where there is no program."""
    if 0 not in grid:
        with torch.cuda.device_of(getattr(args[0], "base", args[0])):
            kernel[grid](*args, **options)


@triton.jit
def tile(rows, channels, BM: tl.constexpr, BC: tl.constexpr):
    """A program's pixels and channels, the pixels as 64-bit rows, and which elements there are."""
    m, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    return m, c, m.to(tl.int64)[:, None], (m < rows)[:, None] & (c < channels)[None, :]


@triton.jit
def load_tile(ptr, row, pitch, c, mask):
    return tl.load(ptr + row * pitch + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, row, pitch, c, mask, values):
    tl.store(ptr + row * pitch + c[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def relu(v):
    """max(v, 0) that keeps NaN."""
    return tl.where(v <= 0, 0.0, v)


@triton.jit
def relu_grad(grad, out):
    """The gradient passes where out > 0 or out is NaN."""
    return tl.where(out <= 0, 0.0, grad)


@triton.jit
def mask_and_sum_kernel(
    grad_out_ptr, out_ptr, grad_ptr, sums_ptr, rows, columns, grad_out_pitch, out_pitch,
    blocks, MASK: tl.constexpr, SUMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """grad = grad_out where out is positive or NaN, else 0; sums[part] = the sums of blocks * BM of its rows, by
    column."""
    part, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for block in range(blocks):
        m = (part * blocks + block) * BM + tl.arange(0, BM)
        mask = (m < rows)[:, None] & (n < columns)[None, :]
        row = m.to(tl.int64)[:, None]
        grad = tl.load(grad_out_ptr + row * grad_out_pitch + n[None, :], mask=mask, other=0.0)
        if MASK:
            out = tl.load(out_ptr + row * out_pitch + n[None, :], mask=mask, other=0.0).to(tl.float32)
            grad = relu_grad(grad, out).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + row * columns + n[None, :], grad, mask=mask)
        if SUMS:
            total += tl.sum(grad.to(tl.float32), axis=0)
    if SUMS:
        tl.store(sums_ptr + part.to(tl.int64) * columns + n, total, mask=n < columns)


MASK_TILE = {"BM": 16, "BN": 64}


def mask_and_sum(grad_out: Tensor, out: Tensor | None, sums: bool) -> tuple[Tensor, Tensor]:
    """(grad_out under the ReLU mask of out, or itself where out is None; its float32 sum by channel, or nothing)."""
    n, columns, height, width = grad_out.shape
    rows = n * height * width
    grad_out, grad_out_pitch = pixels(grad_out)
    mask, mask_pitch = (grad_out, 0) if out is None else pixels(out)
    grad = grad_out if out is None else empty_pixels(grad_out, columns, height, width)
    if out is None and not sums:
        return grad, grad_out.new_empty(0, dtype=torch.float32)
    # Parts by the shape alone, so that sums are the same to the bit in every run.
    bm, bn = MASK_TILE["BM"], MASK_TILE["BN"]
    blocks = max(1, min(16, triton.cdiv(rows, bm * 512)))
    parts = triton.cdiv(rows, bm * blocks)
    partial = torch.empty((parts, columns) if sums else 0, dtype=torch.float32, device=grad_out.device)
    launch(
        mask_and_sum_kernel, (parts, triton.cdiv(columns, bn)), grad_out, mask, grad, partial,
        rows, columns, grad_out_pitch, mask_pitch, blocks, MASK=out is not None, SUMS=sums, **MASK_TILE,
    )  # fmt: skip
    return grad, partial.sum(0) if sums else partial
