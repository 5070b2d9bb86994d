"""max_pool2d in Triton: forward reads x and writes the result, and each window's first largest pixel as one byte where
a gradient will be asked for; backward gathers for every pixel of x from the windows that chose it: no atomics."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._layout import result_format
from .._conv import out_sides
from .._triton import TILE, empty_pixels, launch, load_tile, pixels, store_tile, tile, tiles
from .op import MOST_TAPS


@triton.jit
def window_kernel(
    x_ptr, out_ptr, index_ptr, rows, channels, height, width, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w,
    pad_h, pad_w, dilation_h, dilation_w, x_pitch, INDEX: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Each window's maximum, and with INDEX the place of its first one in the window; NaN is the largest, as in
    PyTorch."""
    m, c, row, valid = tile(rows, channels, BM, BC)
    image, pixel = m // (out_h * out_w), m % (out_h * out_w)
    h0, w0 = pixel // out_w * stride_h - pad_h, pixel % out_w * stride_w - pad_w
    best = tl.full((BM, BC), float("-inf"), tl.float32)
    index = tl.full((BM, BC), -1, tl.int32)
    for tap in range(kernel_h * kernel_w):
        h, w = h0 + tap // kernel_w * dilation_h, w0 + tap % kernel_w * dilation_w
        inside = valid & ((h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
        at = ((image * height + h) * width + w).to(tl.int64) * x_pitch
        v = tl.load(x_ptr + at[:, None] + c[None, :], mask=inside, other=float("-inf")).to(tl.float32)
        better = inside & ((v > best) | (v != v) | (index < 0))  # a later NaN wins over an earlier one, too
        best, index = tl.where(better, v, best), tl.where(better, tap, index)
    store_tile(out_ptr, row, channels, c, valid, best)
    if INDEX:
        store_tile(index_ptr, row, channels, c, valid, index)


@triton.jit
def gather_kernel(
    grad_out_ptr, index_ptr, grad_x_ptr, rows, channels, height, width, out_h, out_w, kernel_h, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, grad_pitch, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """grad_x of a pixel: the gradients of the windows whose first largest pixel it is, in the order of the taps."""
    m, c, row, valid = tile(rows, channels, BM, BC)
    image, pixel = m // (height * width), m % (height * width)
    h, w = pixel // width + pad_h, pixel % width + pad_w
    total = tl.zeros((BM, BC), tl.float32)
    for tap in range(kernel_h * kernel_w):
        y, x = h - tap // kernel_w * dilation_h, w - tap % kernel_w * dilation_w
        oh, ow = y // stride_h, x // stride_w
        inside = (y >= 0) & (x >= 0) & (y % stride_h == 0) & (x % stride_w == 0) & (oh < out_h) & (ow < out_w)
        at = ((image * out_h + oh) * out_w + ow).to(tl.int64)[:, None]
        mask = valid & inside[:, None]
        index = tl.load(index_ptr + at * channels + c[None, :], mask=mask, other=255)
        grad = load_tile(grad_out_ptr, at, grad_pitch, c, mask)
        total += tl.where(index.to(tl.int32) == tap, grad, 0.0)
    store_tile(grad_x_ptr, row, channels, c, valid, total)


def _windows(x: Tensor, window: tuple[Any, ...], *, index: bool) -> tuple[Tensor, Tensor]:
    """The result, and the places in the windows, which are written with `index`."""
    out = empty_pixels(x, x.size(1), *out_sides(x, *window))
    places = torch.empty(out.shape, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)
    n, channels, out_h, out_w = out.shape
    rows = n * out_h * out_w
    pixels_of_x, pitch = pixels(x)
    launch(
        window_kernel, tiles(rows, channels), pixels_of_x, out, places, rows, channels, *x.shape[2:], out_h, out_w,
        *chain(*window[:4]), pitch, INDEX=index, **TILE,
    )  # fmt: skip
    return out.contiguous(memory_format=result_format(x)), places


# `window` is kernel, stride, padding and dilation, (h, w) each, and ceil_mode.
def max_pool2d_fwd(x: Tensor, *window: Any) -> Tensor:
    return _windows(x, window, index=False)[0]


def max_pool2d_index_fwd(x: Tensor, *window: Any) -> tuple[Tensor, Tensor]:
    kernel_h, kernel_w = window[0]
    if kernel_h * kernel_w > MOST_TAPS:
        raise ValueError(
            f"max_pool2d: places are those of windows of at most {MOST_TAPS} pixels, got {kernel_h} x {kernel_w}"
        )
    return _windows(x, window, index=True)


def max_pool2d_index_bwd(grad_out: Tensor, index: Tensor, size: Sequence[int], *window: Any) -> Tensor:
    if index.shape != grad_out.shape or index.dtype != torch.uint8:
        raise ValueError(
            f"max_pool2d: places must be bytes of grad_out's shape {tuple(grad_out.shape)}, "
            f"got {tuple(index.shape)} of {index.dtype}"
        )
    index = index.contiguous(memory_format=torch.channels_last)  # what saved it may have lost its layout
    n, channels = grad_out.shape[:2]
    height, width = size
    rows = n * height * width
    grad_x = empty_pixels(grad_out, channels, height, width)
    g, pitch = pixels(grad_out)
    launch(
        gather_kernel, tiles(rows, channels), g, index, grad_x, rows, channels, height, width, *grad_out.shape[2:],
        *chain(*window[:4]), pitch, **TILE,
    )  # fmt: skip
    return grad_x.contiguous(memory_format=result_format(grad_out))
