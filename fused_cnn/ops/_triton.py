"""What every room's triton.py shares: rows of pixels, ReLU as PyTorch defines it, masked sums, the form of its list
SHIPPED."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Shipped:
    """One kernel as a launcher calls it. Each room lists its own in SHIPPED, and `make compile-check` compiles them
    without a GPU.

    `pointers` are in the dtype that the op runs in, one of `dtypes`; `float32` always to float32, `bytes` to uint8.
    `scalars` are 32-bit integers, those of them in `aligned` multiples of 16; `floats` are float32 values.
    `descriptors` are TMA descriptors (Hopper and later) with the shape of their blocks; `constants` are the kernel's
    tl.constexpr arguments.
    """

    kernel: triton.JITFunction
    pointers: tuple[str, ...]
    scalars: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    aligned: tuple[str, ...] = ()
    descriptors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    bytes: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("fp16", "bf16", "fp32")

    def label(self, dtype: str) -> str:
        """The kernel, its dtype and what sets this configuration apart."""
        tile = "x".join(
            str(self.constants[name]) for name in ("BM", "BN", "BC", "BK", "BLOCK") if name in self.constants
        )
        switches = [name.lower() for name, value in self.constants.items() if value is True]
        switches += [str(self.constants["PRECISION"])] if dtype == "fp32" and "PRECISION" in self.constants else []
        return " ".join([self.kernel.__name__, dtype, tile, *switches])


DTYPES = {"16-bit": ("fp16", "bf16"), "tf32": ("fp32",), "ieee": ("fp32",)}  # by products(): what runs so
PRECISION = {"16-bit": "tf32", "tf32": "tf32", "ieee": "ieee"}  # tl.dot's input_precision, which is about float32 alone


def products(dtype: torch.dtype) -> str:
    """How products are taken: of 16-bit operands, or of float32 ones as PyTorch's setting for convolutions says."""
    if dtype != torch.float32:
        return "16-bit"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def grid_1d(elements: int, block: int) -> tuple[int]:
    """A one-dimensional grid, checked against CUDA's limit of 2^31 - 1 blocks."""
    blocks = triton.cdiv(elements, block)
    if blocks >= 2**31:
        raise ValueError(f"{elements} elements need {blocks} blocks of {block}; one launch takes at most {2**31 - 1}")
    return (blocks,)


def dense_like(t: Tensor, like: Tensor) -> Tensor:
    """t in like's dense layout (channels_last or contiguous), copied only where it is not so already."""
    from .._layout import result_format

    return t.contiguous(memory_format=result_format(like))


MAX_PIXELS = 2**31 - 2**16  # a pixel's number is a 32-bit integer, also in the tiles that overhang the last one
MAX_CHANNELS = 2**21  # 64 a program on an axis of the grid, which has 65535


def check_size(n: int, channels: int, height: int, width: int) -> None:
    """What the kernels can number. Offsets in memory, pixels times channels, are 64-bit."""
    if n * height * width > MAX_PIXELS or channels > MAX_CHANNELS:
        raise ValueError(
            f"Triton's kernels take at most {MAX_PIXELS} pixels (N * H * W) of {MAX_CHANNELS} channels, "
            f"got shape {(n, channels, height, width)}"
        )


class Pixels(NamedTuple):
    """An activation as rows of pixels, `pitch` elements apart, channels adjacent."""

    tensor: Tensor
    pitch: int


def pixels(t: Tensor) -> Pixels:
    """t itself where its pixels are evenly spaced with adjacent channels, else a channels_last copy."""
    check_size(*t.shape)
    c, h, w = t.shape[1:]
    pitch = t.stride(3)
    if t.stride() != (pitch * w * h, 1, pitch * w, pitch) or pitch < c:
        t, pitch = empty_pixels(t, c, h, w).copy_(t), c
    return Pixels(t, pitch)


def empty_pixels(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised channels_last activation for `like`'s images."""
    shape = (like.size(0), channels, height, width)
    check_size(*shape)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


@lru_cache
def processors(device: torch.device) -> int:
    """How many programs fill the device: its multiprocessors; a few in the interpreter."""
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


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
    MASK: tl.constexpr, SUMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """grad = grad_out where out is positive or NaN, else 0; sums[part] = the sums of BLOCKS * BM of its rows, by
    column."""
    part, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for block in range(BLOCKS):
        m = (part * BLOCKS + block) * BM + tl.arange(0, BM)
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
MASK_AND_SUM = Shipped(
    mask_and_sum_kernel, ("grad_out_ptr", "out_ptr", "grad_ptr"), ("rows", "columns", "grad_out_pitch", "out_pitch"),
    ("sums_ptr",),
    aligned=("columns", "grad_out_pitch", "out_pitch"), constants={"MASK": True, "SUMS": True, "BLOCKS": 16,
    **MASK_TILE},
)  # fmt: skip


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
    if rows * columns:
        with torch.cuda.device_of(grad_out):
            mask_and_sum_kernel[(parts, triton.cdiv(columns, bn))](
                grad_out, mask, grad, partial, rows, columns, grad_out_pitch, mask_pitch,
                MASK=out is not None, SUMS=sums, BLOCKS=blocks, **MASK_TILE,
            )  # fmt: skip
    return grad, partial.sum(0) if sums else partial
