"""batch_norm in Triton, in honest steps: statistics (two stages), apply; backward sums (two stages), apply. No atomics:
reruns are equal.

Activations are rows of pixels. A program of a first stage takes `blocks` tiles of rows and leaves one partial result a
channel; the second stage merges these in order. y = (x - mean) * rstd * weight + bias is computed again in backward,
and with it the ReLU mask, except where a plain residual was added: its mask is kept, one bit an element.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._layout import result_format
from .._triton import CHANNELS, ROWS, TILE, empty_pixels, launch, load_tile, pixels, relu, store_tile, tile, tiles

PARTS = 512  # of a first stage, at most

NO_MASK, RECOMPUTED, BITS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # where backward finds the ReLU mask


@triton.jit
def merge(count, mean, m2, other_count, other_mean, other_m2):
    """Moments of two samples as those of one (Chan, Golub and LeVeque, 1979); other_count may be 0."""
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    delta = other_mean - mean
    return total, mean + delta * share, m2 + other_m2 + delta * (delta * (count * share))


@triton.jit
def stats_kernel(x_ptr, partial_ptr, rows, channels, x_pitch, blocks, BM: tl.constexpr, BC: tl.constexpr):
    """partial[part] = (mean, sum of squared differences) of blocks * BM rows, by channel."""
    part, c = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    count, mean, m2 = 0.0, tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for block in range(blocks):
        first = (part * blocks + block) * BM
        m = first + tl.arange(0, BM)
        inside = (m < rows)[:, None]
        x = load_tile(x_ptr, m.to(tl.int64)[:, None], x_pitch, c, inside & (c < channels)[None, :])
        n = tl.minimum(tl.maximum(rows - first, 0), BM).to(tl.float32)
        tile_mean = tl.sum(x, axis=0) / tl.maximum(n, 1.0)
        off = tl.where(inside, x - tile_mean[None, :], 0.0)
        count, mean, m2 = merge(count, mean, m2, n, tile_mean, tl.sum(off * off, axis=0))
    at = part.to(tl.int64) * 2 * channels + c
    tl.store(partial_ptr + at, mean, mask=c < channels)
    tl.store(partial_ptr + at + channels, m2, mask=c < channels)


@triton.jit
def finish_stats_kernel(
    partial_ptr, mean_ptr, rstd_ptr, var_ptr, rows, channels, parts, part_rows, eps, BC: tl.constexpr
):
    """mean, 1 / sqrt(biased variance + eps) and the unbiased variance."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    count, mean, m2 = 0.0, tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for part in range(parts):
        at = part * 2 * channels + c
        other_mean = tl.load(partial_ptr + at, mask=c < channels, other=0.0)
        other_m2 = tl.load(partial_ptr + at + channels, mask=c < channels, other=0.0)
        n = tl.minimum(rows - part * part_rows, part_rows).to(tl.float32)
        count, mean, m2 = merge(count, mean, m2, n, other_mean, other_m2)
    tl.store(mean_ptr + c, mean, mask=c < channels)
    tl.store(rstd_ptr + c, 1.0 / tl.sqrt_rn(m2 / count + eps), mask=c < channels)
    tl.store(var_ptr + c, m2 / tl.maximum(count - 1.0, 1.0), mask=c < channels)


@triton.jit
def vector(ptr, c, channels):
    return tl.load(ptr + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def apply_kernel(
    x_ptr, residual_ptr, out_ptr, mask_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, weight2_ptr, bias2_ptr,
    rows, channels, x_pitch, residual_pitch, out_pitch,
    ADD: tl.constexpr, INPUTS: tl.constexpr, RELU: tl.constexpr, SAVE_BITS: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """out = relu(bn(x) [+ residual, itself normalised where INPUTS is 2])."""
    m, c, row, mask = tile(rows, channels, BM, BC)
    x = load_tile(x_ptr, row, x_pitch, c, mask)
    scale = vector(rstd_ptr, c, channels) * vector(weight_ptr, c, channels)
    y = (x - vector(mean_ptr, c, channels)) * scale + vector(bias_ptr, c, channels)
    if ADD:
        r = load_tile(residual_ptr, row, residual_pitch, c, mask)
        if INPUTS == 2:
            scale = vector(rstd_ptr + channels, c, channels) * vector(weight2_ptr, c, channels)
            r = (r - vector(mean_ptr + channels, c, channels)) * scale + vector(bias2_ptr, c, channels)
        y += r
    if SAVE_BITS:
        bits = tl.where((y <= 0) | (c >= channels)[None, :], 0, 1) << (c % 8)[None, :]
        packed = tl.sum(tl.reshape(bits, (BM, BC // 8, 8)), axis=2)
        byte = tl.program_id(1) * (BC // 8) + tl.arange(0, BC // 8)
        width = (channels + 7) // 8
        store_tile(mask_ptr, row, width, byte, (m < rows)[:, None] & (byte < width)[None, :], packed)
    if RELU:
        y = relu(y)
    store_tile(out_ptr, row, out_pitch, c, mask, y)


@triton.jit
def gradient(
    grad_out_ptr, x_ptr, residual_ptr, mask_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, weight2_ptr, bias2_ptr,
    m, c, rows, channels, grad_pitch, x_pitch, residual_pitch, INPUTS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """(grad_out under the ReLU mask, x - mean, residual - its mean) of a tile."""
    inside = (m < rows)[:, None]
    row, mask = m.to(tl.int64)[:, None], inside & (c < channels)[None, :]
    g = load_tile(grad_out_ptr, row, grad_pitch, c, mask)
    x = load_tile(x_ptr, row, x_pitch, c, mask) - vector(mean_ptr, c, channels)
    r = x
    if INPUTS == 2:
        r = load_tile(residual_ptr, row, residual_pitch, c, mask) - vector(mean_ptr + channels, c, channels)
    if MASK == RECOMPUTED:
        y = x * (vector(rstd_ptr, c, channels) * vector(weight_ptr, c, channels)) + vector(bias_ptr, c, channels)
        if INPUTS == 2:
            scale = vector(rstd_ptr + channels, c, channels) * vector(weight2_ptr, c, channels)
            y += r * scale + vector(bias2_ptr, c, channels)
        g = tl.where(y <= 0, 0.0, g)
    if MASK == BITS:
        width = (channels + 7) // 8
        byte = tl.program_id(1) * (c.shape[0] // 8) + tl.arange(0, c.shape[0] // 8)
        there = inside & (byte < width)[None, :]
        packed = tl.load(mask_ptr + row * width + byte[None, :], mask=there, other=0)
        bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        g = tl.where(tl.reshape(bits, (m.shape[0], c.shape[0])) == 1, g, 0.0)
    return g, x, r


@triton.jit
def sums_kernel(
    grad_out_ptr, x_ptr, residual_ptr, mask_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, weight2_ptr, bias2_ptr,
    partial_ptr,
    rows, channels, grad_pitch, x_pitch, residual_pitch, blocks,
    INPUTS: tl.constexpr, MASK: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """partial[part] = the sums of g, of g (x - mean) and, with two inputs, of g (residual - its mean)."""
    part, c = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    sum_g, sum_x, sum_r = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for block in range(blocks):
        m = (part * blocks + block) * BM + tl.arange(0, BM)
        g, x, r = gradient(
            grad_out_ptr, x_ptr, residual_ptr, mask_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, weight2_ptr,
            bias2_ptr,
            m, c, rows, channels, grad_pitch, x_pitch, residual_pitch, INPUTS, MASK,
        )  # fmt: skip
        inside = (m < rows)[:, None]  # a mean of infinity makes NaN of the zeros outside
        sum_g += tl.sum(tl.where(inside, g, 0.0), axis=0)
        sum_x += tl.sum(tl.where(inside, g * x, 0.0), axis=0)
        if INPUTS == 2:
            sum_r += tl.sum(tl.where(inside, g * r, 0.0), axis=0)
    at = part.to(tl.int64) * 3 * channels + c
    tl.store(partial_ptr + at, sum_g, mask=c < channels)
    tl.store(partial_ptr + at + channels, sum_x, mask=c < channels)
    if INPUTS == 2:
        tl.store(partial_ptr + at + 2 * channels, sum_r, mask=c < channels)


@triton.jit
def finish_sums_kernel(
    partial_ptr, rstd_ptr, grad_weight_ptr, grad_bias_ptr, offset_ptr, slope_ptr, rows, channels, parts,
    BC: tl.constexpr,
):  # fmt: skip
    """For input program_id(1): the parameters' gradients, and what grad_input subtracts; in float64, for many parts."""
    c, i = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(1)
    sum_g, sum_x = tl.zeros((BC,), tl.float64), tl.zeros((BC,), tl.float64)
    for part in range(parts):
        at = part * 3 * channels + c
        sum_g += tl.load(partial_ptr + at, mask=c < channels, other=0.0)
        sum_x += tl.load(partial_ptr + at + (i + 1) * channels, mask=c < channels, other=0.0)
    at = i * channels + c
    rstd = tl.load(rstd_ptr + at, mask=c < channels, other=0.0).to(tl.float64)
    tl.store(grad_bias_ptr + at, sum_g.to(tl.float32), mask=c < channels)
    tl.store(grad_weight_ptr + at, (sum_x * rstd).to(tl.float32), mask=c < channels)
    tl.store(offset_ptr + at, (sum_g / rows).to(tl.float32), mask=c < channels)
    tl.store(slope_ptr + at, (sum_x * rstd * rstd / rows).to(tl.float32), mask=c < channels)


@triton.jit
def grad_input_kernel(
    grad_out_ptr, x_ptr, residual_ptr, mask_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, weight2_ptr, bias2_ptr,
    offset_ptr, slope_ptr, grad_x_ptr, grad_residual_ptr, rows, channels, grad_pitch, x_pitch, residual_pitch,
    INPUTS: tl.constexpr, MASK: tl.constexpr, ADD: tl.constexpr, TRAIN: tl.constexpr, TRAIN2: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """grad_x = (g - mean(g) - (x - mean) rstd^2 mean(g (x - mean))) * rstd * weight with batch statistics, else g *
    rstd * weight."""
    m, c, row, mask = tile(rows, channels, BM, BC)
    g, x, r = gradient(
        grad_out_ptr, x_ptr, residual_ptr, mask_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, weight2_ptr, bias2_ptr,
        m, c, rows, channels, grad_pitch, x_pitch, residual_pitch, INPUTS, MASK,
    )  # fmt: skip
    grad = g
    if TRAIN:
        grad = g - vector(offset_ptr, c, channels) - x * vector(slope_ptr, c, channels)
    grad *= vector(rstd_ptr, c, channels) * vector(weight_ptr, c, channels)
    store_tile(grad_x_ptr, row, channels, c, mask, grad)
    if ADD:
        grad = g
        if INPUTS == 2:
            if TRAIN2:
                grad = g - vector(offset_ptr + channels, c, channels) - r * vector(slope_ptr + channels, c, channels)
            grad *= vector(rstd_ptr + channels, c, channels) * vector(weight2_ptr, c, channels)
        store_tile(grad_residual_ptr, row, channels, c, mask, grad)


def _split(rows: int) -> tuple[int, int]:
    """How a first stage cuts the rows, into parts of so many tiles: by their number alone, so that sums are the same in
    every run and on every device."""
    blocks = triton.cdiv(triton.cdiv(rows, ROWS), PARTS)
    return triton.cdiv(rows, ROWS * blocks) if rows else 0, blocks


def bn_stats(xs: Sequence[Tensor], eps: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [x.size(1) for x in xs]
    mean, rstd, var = (torch.empty(sum(sizes), dtype=torch.float32, device=xs[0].device) for _ in range(3))
    for x, e, *results in zip(xs, eps, mean.split(sizes), rstd.split(sizes), var.split(sizes), strict=True):
        rows, channels = x.size(0) * x.size(2) * x.size(3), x.size(1)
        parts, blocks = _split(rows)
        x, pitch = pixels(x)
        partial = torch.empty((parts, 2, channels), dtype=torch.float32, device=x.device)
        columns = triton.cdiv(channels, CHANNELS)
        launch(stats_kernel, (parts, columns), x, partial, rows, channels, pitch, blocks, **TILE)
        sizes_and_eps = (rows, channels, parts, blocks * ROWS, e)
        launch(finish_stats_kernel, (columns,), partial, *results, *sizes_and_eps, BC=CHANNELS)
    return mean, rstd, var


def bn_relu_concat_fwd(
    xs: Sequence[Tensor], mean: Tensor, rstd: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], relu: bool
) -> Tensor:
    sizes = [x.size(1) for x in xs]
    out = empty_pixels(xs[0], sum(sizes), *xs[0].shape[2:])
    rows = out.size(0) * out.size(2) * out.size(3)
    branches = zip(xs, out.split(sizes, 1), mean.split(sizes), rstd.split(sizes), weights, biases, strict=True)
    for x, part, m, r, w, b in branches:
        y, pitch = pixels(x)
        launch(
            apply_kernel, tiles(rows, x.size(1)), y, y, part, y, m, r, w, b, w, b, rows, x.size(1), pitch, 0,
            out.size(1), ADD=False, INPUTS=1, RELU=relu, SAVE_BITS=False, **TILE,
        )  # fmt: skip
    return out.contiguous(memory_format=result_format(xs[0]))


def bn_add_relu_fwd(
    x: Tensor, residual: Tensor, mean: Tensor, rstd: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor],
    save_mask: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, channels, height, width = x.shape
    rows, saves = n * height * width, save_mask and len(weights) == 1
    out = empty_pixels(x, channels, height, width)
    mask = torch.empty((rows if saves else 0, (channels + 7) // 8), dtype=torch.uint8, device=x.device)
    y, pitch = pixels(x)
    r, residual_pitch = pixels(residual)
    launch(
        apply_kernel, tiles(rows, channels), y, r, out, mask, mean, rstd, weights[0], biases[0], weights[-1],
        biases[-1], rows, channels, pitch, residual_pitch, channels, ADD=True, INPUTS=len(weights), RELU=True,
        SAVE_BITS=saves, **TILE,
    )  # fmt: skip
    return out.contiguous(memory_format=result_format(x)), mask


def _backward(
    grad_out: Tensor, x: Tensor, residual: Tensor | None, bits: Tensor | None, vectors: tuple[Tensor, ...],
    training: Sequence[bool], relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad_x, grad_residual, grad_weight, grad_bias) of one branch, or of the two inputs of a sum."""
    n, channels, height, width = x.shape
    rows, inputs = n * height * width, len(training)
    adds = residual is not None or bits is not None
    mask = BITS if bits is not None else RECOMPUTED if relu else NO_MASK
    parts, blocks = _split(rows)
    grad_x = empty_pixels(x, channels, height, width)
    grad_residual = empty_pixels(x, channels, height, width) if adds else grad_x
    grad_weight, grad_bias = (x.new_zeros(inputs * channels, dtype=torch.float32) for _ in range(2))
    offset, slope = x.new_empty((2, inputs * channels), dtype=torch.float32)
    (g, grad_pitch), (y, x_pitch) = pixels(grad_out), pixels(x)
    r, residual_pitch = (y, 0) if residual is None else pixels(residual)
    partial = x.new_empty((parts, 3, channels), dtype=torch.float32)
    sources = (g, y, r, y if bits is None else bits, *vectors)
    sizes = (rows, channels, grad_pitch, x_pitch, residual_pitch)
    options: dict[str, Any] = {"INPUTS": inputs, "MASK": mask.value, **TILE}
    columns = triton.cdiv(channels, CHANNELS) if rows else 0
    launch(sums_kernel, (parts, columns), *sources, partial, *sizes, blocks, **options)
    launch(
        finish_sums_kernel, (columns, inputs), partial, vectors[1], grad_weight, grad_bias, offset, slope, rows,
        channels, parts, BC=CHANNELS,
    )  # fmt: skip
    launch(
        grad_input_kernel, tiles(rows, channels), *sources, offset, slope, grad_x, grad_residual, *sizes, ADD=adds,
        TRAIN=training[0], TRAIN2=training[-1], **options,
    )  # fmt: skip
    grad_x, grad_residual = (grad.contiguous(memory_format=result_format(x)) for grad in (grad_x, grad_residual))
    return grad_x, grad_residual, grad_weight, grad_bias


def bn_relu_concat_bwd(
    grad_out: Tensor, xs: Sequence[Tensor], mean: Tensor, rstd: Tensor, weights: Sequence[Tensor],
    biases: Sequence[Tensor], training: Sequence[bool], relu: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    sizes = [x.size(1) for x in xs]
    branches = zip(
        grad_out.split(sizes, 1), xs, mean.split(sizes), rstd.split(sizes), weights, biases, training, strict=True
    )
    grads = [_backward(g, x, None, None, (m, r, w, b, w, b), (t,), relu) for g, x, m, r, w, b, t in branches]
    grad_xs, _, grad_weights, grad_biases = zip(*grads, strict=True)
    return list(grad_xs), torch.cat(grad_weights), torch.cat(grad_biases)


def bn_add_relu_bwd(
    grad_out: Tensor, x: Tensor, residual: Tensor | None, mask: Tensor | None, mean: Tensor, rstd: Tensor,
    weights: Sequence[Tensor], biases: Sequence[Tensor], training: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if len(weights) == 1 and mask is None:
        raise ValueError("bn_add_relu_bwd: the forward's mask is needed, got none")
    vectors = (mean, rstd, weights[0], biases[0], weights[-1], biases[-1])
    return _backward(grad_out, x, residual, mask, vectors, training)
