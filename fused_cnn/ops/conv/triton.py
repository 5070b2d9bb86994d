"""conv_bias_relu and add_relu in Triton.

Forward is the implicit GEMM of _triton_conv.py for every kernel size. Backward of a 1x1 convolution is two products:

    grad   = grad_out where out > 0 or NaN       (written by dgrad's first column of tiles, as it loads grad_out)
    grad_x = grad @ weight                       (rows scattered to the pixels that a stride read, zeros elsewhere)
    grad_w = grad^T @ x, grad_bias = sums of grad    (split-K over pixels in two stages: the same sums every time)

Backward of other convolutions masks grad_out and sums grad_bias in one pass, then asks cuDNN for the gradients.
add_relu is one pass over adjacent elements: it reads two tensors and writes one, in blocks of 2048, and reached a
copy's bandwidth (285 us for 290 us of roofline at (256, 256, 56, 56) in bfloat16, H200, 2026-11-26).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._candidates import Candidate, pick
from ..._layout import empty_nchw, result_format
from .._conv import is_pointwise, on_16_bytes, out_sides
from .._triton import PRECISION, empty_pixels, launch, mask_and_sum, pixels, processors, products, relu, relu_grad
from .._triton_conv import Geometry, Tiles, conv_forward, weight_rows

ADD_BLOCK = 2048
ADD_WARPS = 8


@triton.jit
def add_relu_block(a_ptr, b_ptr, out_ptr, i, mask, GRAD: tl.constexpr):
    a, b = tl.load(a_ptr + i, mask=mask).to(tl.float32), tl.load(b_ptr + i, mask=mask).to(tl.float32)
    values = relu_grad(a, b) if GRAD else relu(a + b)
    tl.store(out_ptr + i, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_relu_kernel(a_ptr, b_ptr, out_ptr, n, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """out = relu(a + b), or with GRAD a, which is grad_out, where b, forward's result, is positive or NaN."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    # A mask keeps Triton from 16-byte accesses unless it knows that n is a multiple of 16, so whole blocks go without.
    if start + BLOCK <= n:
        add_relu_block(a_ptr, b_ptr, out_ptr, i, None, GRAD)
    else:
        add_relu_block(a_ptr, b_ptr, out_ptr, i, i < n, GRAD)


# By products(), the first is the default. dgrad's tile is pixels by in channels, with out channels a step; wgrad's out
# channels by in channels, with pixels a step.
GRAD_TILES = {
    "16-bit": [*map(Candidate, (Tiles(64, 64, 32, 4, 3), Tiles(64, 64, 64, 4, 3), Tiles(128, 64, 64, 8, 3)))],
    "tf32": [*map(Candidate, (Tiles(64, 64, 32, 4, 3), Tiles(64, 64, 32, 8, 3)))],
    "ieee": [Candidate(Tiles(64, 64, 16, 8, 3))],
}


@triton.jit
def dgrad_kernel(
    grad_out_ptr, out_ptr, weight_ptr, grad_x_ptr, grad_ptr,
    rows, columns, channels, height, width, out_h, out_w, stride_h, stride_w, grad_out_pitch, out_pitch,
    MASK: tl.constexpr, STRIDED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    tiles_c = tl.cdiv(channels, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BM) * tiles_c, tl.num_programs(0)):
        pid_m, pid_c = tile // tiles_c, tile % tiles_c
        m, c = pid_m * BM + tl.arange(0, BM), pid_c * BN + tl.arange(0, BN)
        row = m.to(tl.int64)[:, None]
        writes = (m * 0 + pid_c) == 0
        acc = tl.zeros((BM, BN), tl.float32)
        for start in tl.range(0, columns, BK):
            n = start + tl.arange(0, BK)
            mask = (m < rows)[:, None] & (n < columns)[None, :]
            grad = tl.load(grad_out_ptr + row * grad_out_pitch + n[None, :], mask=mask, other=0.0)
            if MASK:
                out = tl.load(out_ptr + row * out_pitch + n[None, :], mask=mask, other=0.0).to(tl.float32)
                grad = relu_grad(grad, out).to(grad_x_ptr.dtype.element_ty)
                tl.store(grad_ptr + row * columns + n[None, :], grad, mask=mask & writes[:, None])
            at = n.to(tl.int64)[:, None] * channels + c[None, :]
            weight = tl.load(weight_ptr + at, mask=(n < columns)[:, None] & (c < channels)[None, :], other=0.0)
            acc = tl.dot(grad, weight, acc, input_precision=PRECISION)
        if STRIDED:
            image, pixel = m // (out_h * out_w), m % (out_h * out_w)
            read = (image * height + pixel // out_w * stride_h) * width + pixel % out_w * stride_w
            row = read.to(tl.int64)[:, None]
        mask = (m < rows)[:, None] & (c < channels)[None, :]
        tl.store(grad_x_ptr + row * channels + c[None, :], acc.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def wgrad_kernel(
    grad_ptr, x_ptr, partial_ptr, sums_ptr,
    rows, columns, channels, height, width, out_h, out_w, stride_h, stride_w, grad_pitch, x_pitch, steps,
    SUMS: tl.constexpr, STRIDED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Part `part` of grad^T @ x, over the pixels from part * steps * BK, and with SUMS of grad's column sums."""
    tiles_c = tl.cdiv(channels, BN)
    tile, part = tl.program_id(0), tl.program_id(1)
    pid_n, pid_c = tile // tiles_c, tile % tiles_c
    n, c = pid_n * BM + tl.arange(0, BM), pid_c * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for step in tl.range(0, steps):
        m = (part * steps + step) * BK + tl.arange(0, BK)
        row = m.to(tl.int64)[:, None]
        grad = tl.load(
            grad_ptr + row * grad_pitch + n[None, :], mask=(m < rows)[:, None] & (n < columns)[None, :], other=0.0
        )
        if STRIDED:
            image, pixel = m // (out_h * out_w), m % (out_h * out_w)
            read = (image * height + pixel // out_w * stride_h) * width + pixel % out_w * stride_w
            row = read.to(tl.int64)[:, None]
        x = tl.load(x_ptr + row * x_pitch + c[None, :], mask=(m < rows)[:, None] & (c < channels)[None, :], other=0.0)
        acc = tl.dot(grad.T, x, acc, input_precision=PRECISION)
        if SUMS:
            total += tl.sum(grad.to(tl.float32), axis=0)
    mask = (n < columns)[:, None] & (c < channels)[None, :]
    at = (part.to(tl.int64) * columns + n)[:, None] * channels + c[None, :]
    tl.store(partial_ptr + at, acc, mask=mask)
    if SUMS:
        tl.store(sums_ptr + part.to(tl.int64) * columns + n, total, mask=(n < columns) & ((n * 0 + pid_c) == 0))


def _add_relu(a: Tensor, b: Tensor, like: Tensor, grad: bool) -> Tensor:
    out = empty_nchw(like, *like.shape[1:])
    a, b = (t.contiguous(memory_format=result_format(like)) for t in (a, b))
    grid = (triton.cdiv(out.numel(), ADD_BLOCK),)
    launch(add_relu_kernel, grid, a, b, out, out.numel(), GRAD=grad, BLOCK=ADD_BLOCK, num_warps=ADD_WARPS)
    return out


def add_relu_fwd(x: Tensor, residual: Tensor) -> Tensor:
    return _add_relu(x, residual, x, grad=False)


def add_relu_bwd(grad_out: Tensor, out: Tensor) -> Tensor:
    return _add_relu(grad_out, out, out, grad=True)


def conv_bias_relu_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    kernel = (weight.size(2), weight.size(3))
    geometry = Geometry(kernel, tuple(stride), tuple(padding), tuple(dilation))
    out = empty_pixels(x, weight.size(0), *out_sides(x, *geometry[:4]))
    width, columns = weight.size(1), weight.size(0) // groups
    for g in range(groups):  # a slice of the channels to a slice of the channels
        part = slice(g * columns, (g + 1) * columns)
        conv_forward(
            x[:, g * width : (g + 1) * width],
            weight_rows(weight[part]),
            None if bias is None else bias[part],
            None if residual is None else residual[:, part],
            geometry,
            relu,
            [out[:, part]],
        )
    return out.contiguous(memory_format=result_format(x))


def conv_bias_relu_bwd(
    grad_out: Tensor,
    out: Tensor | None,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = grad_out.new_empty(0)
    grad_x = grad_weight = none
    pointwise = is_pointwise(weight, padding, groups)
    if pointwise and needs_x and grad_out.numel() and x.numel():
        grad_x, grad = _dgrad(grad_out, out, x, weight, stride)
        grad_bias = mask_and_sum(grad, None, True)[1] if needs_bias and not needs_weight else none
    else:
        grad, grad_bias = mask_and_sum(grad_out, out, needs_bias and not (pointwise and needs_weight))
        grad_x = torch.zeros_like(x) if pointwise and needs_x else none
    if pointwise and needs_weight:
        grad_weight, grad_bias = _wgrad(grad, x, stride, needs_bias)
        grad_weight = grad_weight.view(weight.shape)
    elif not pointwise and (needs_x or needs_weight):
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            *map(on_16_bytes, (grad, x, weight)), None,
            stride, padding, dilation, False, [0, 0], groups, [needs_x, needs_weight, False],
        )  # fmt: skip
    return (
        grad_x.contiguous(memory_format=result_format(x)) if needs_x else none,
        grad_weight.contiguous(memory_format=result_format(weight)) if needs_weight else none,
        grad_bias.to(x.dtype),
        none if out is None else grad.contiguous(memory_format=result_format(out)),
    )


def _sizes(grad: Tensor, x: Tensor, stride: Sequence[int]) -> tuple[int, ...]:
    """Both kernels' rows, columns, channels, height, width, out_h, out_w and stride."""
    n, columns, out_h, out_w = grad.shape
    return (n * out_h * out_w, columns, *x.shape[1:], out_h, out_w, *stride)


def _dgrad(
    grad_out: Tensor, out: Tensor | None, x: Tensor, weight: Tensor, stride: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_out under the mask)."""
    sizes, strided = _sizes(grad_out, x, stride), tuple(stride) != (1, 1)
    rows, columns, channels = sizes[:3]
    grad_out, grad_out_pitch = pixels(grad_out)
    mask, mask_pitch = (grad_out, 0) if out is None else pixels(out)
    grad = grad_out if out is None else empty_pixels(x, *grad_out.shape[1:])
    grad_x = empty_pixels(x, *x.shape[1:])
    if strided:
        grad_x.zero_()
    weight, kind = weight_rows(weight), products(x.dtype)

    def run(tiles: Tiles) -> None:
        programs = triton.cdiv(rows, tiles.BM) * triton.cdiv(channels, tiles.BN)
        launch(
            dgrad_kernel, (min(programs, 4 * processors(x.device)),),
            grad_out, mask, weight, grad_x, grad, *sizes, grad_out_pitch, mask_pitch,
            MASK=out is not None, STRIDED=strided, PRECISION=PRECISION[kind], **tiles._asdict(),
        )  # fmt: skip

    problem = (kind, rows, columns, channels, strided, out is not None)
    run(pick("dgrad_kernel", problem, GRAD_TILES[kind], run, x.device))
    return grad_x, grad


def _wgrad(grad: Tensor, x: Tensor, stride: Sequence[int], bias: bool) -> tuple[Tensor, Tensor]:
    sizes, strided = _sizes(grad, x, stride), tuple(stride) != (1, 1)
    rows, columns, channels = sizes[:3]
    grad, grad_pitch = pixels(grad)
    x, x_pitch = pixels(x)
    kind = products(x.dtype)
    problem = (kind, rows, columns, channels, strided, bias)
    result: list[Tensor] = []

    def run(tiles: Tiles) -> None:
        programs = triton.cdiv(columns, tiles.BM) * triton.cdiv(channels, tiles.BN)
        # Parts enough to fill the device, of at least 32 steps: a matter of shape, tiles and device, so that sums
        # repeat.
        parts = max(1, min(2 * processors(x.device) // max(1, programs), rows // 1024))
        steps = triton.cdiv(triton.cdiv(rows, tiles.BK), parts)
        partial = torch.empty((parts, columns, channels), dtype=torch.float32, device=x.device)
        sums = torch.empty((parts, columns) if bias else 0, dtype=torch.float32, device=x.device)
        launch(
            wgrad_kernel, (programs, parts), grad, x, partial, sums, *sizes, grad_pitch, x_pitch, steps,
            SUMS=bias, STRIDED=strided, PRECISION=PRECISION[kind], **tiles._asdict(),
        )  # fmt: skip
        result[:] = partial.sum(0).to(x.dtype), sums.sum(0) if bias else sums

    run(pick("wgrad_kernel", problem, GRAD_TILES[kind], run, x.device))
    return result[0], result[1]
