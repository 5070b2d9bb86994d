"""concat_bias_relu in Triton: each branch read once and written once into its slice; backward a masked gradient a
branch, and sums."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._layout import result_format
from .._triton import TILE, empty_pixels, launch, load_tile, mask_and_sum, pixels, relu, store_tile, tile, tiles


@triton.jit
def bias_relu_kernel(
    x_ptr, bias_ptr, out_ptr, rows, channels, x_pitch, out_pitch, BIAS: tl.constexpr, RELU: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    _, c, row, mask = tile(rows, channels, BM, BC)
    v = load_tile(x_ptr, row, x_pitch, c, mask)
    if BIAS:
        v += tl.load(bias_ptr + c, mask=c < channels, other=0.0)[None, :]
    if RELU:
        v = relu(v)
    store_tile(out_ptr, row, out_pitch, c, mask, v)


def concat_bias_relu_fwd(branches: Sequence[Tensor], bias: Tensor | None, relu: bool) -> Tensor:
    first = branches[0]
    sizes = [b.size(1) for b in branches]
    out = empty_pixels(first, sum(sizes), *first.shape[2:])
    rows = first.size(0) * first.size(2) * first.size(3)
    biases = [out] * len(sizes) if bias is None else bias.contiguous().split(sizes)
    for branch, part, b in zip(branches, out.split(sizes, 1), biases, strict=True):
        channels = branch.size(1)
        branch, pitch = pixels(branch)
        launch(
            bias_relu_kernel, tiles(rows, channels), branch, b, part, rows, channels, pitch, out.size(1),
            BIAS=bias is not None, RELU=relu, **TILE,
        )  # fmt: skip
    return out.contiguous(memory_format=result_format(first))


def concat_bias_relu_bwd(
    grad_out: Tensor, out: Tensor | None, channels: Sequence[int], bias: bool
) -> tuple[list[Tensor], Tensor]:
    grads, sums = [], []
    outs = [None] * len(channels) if out is None else out.split(list(channels), 1)
    like = result_format(grad_out if out is None else out)
    for grad, part in zip(grad_out.split(list(channels), 1), outs, strict=True):
        masked, total = mask_and_sum(grad, part, bias)
        # Without ReLU the gradient is a view of grad_out's slice, and results share no memory with arguments.
        masked = masked.clone(memory_format=like) if out is None else masked.contiguous(memory_format=like)
        grads.append(masked)
        sums.append(total)
    return grads, torch.cat(sums) if bias else grad_out.new_empty(0, dtype=torch.float32)
