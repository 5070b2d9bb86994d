"""residual_block: out = relu(conv_n(... relu(conv_1(x))) + shortcut(x)), ResNet's block in eval form (BatchNorm folded).

The native CPU form of what is otherwise one conv_bias_relu after the other. A few images at a time go through all the convolutions, so
that what lies between them stays in the processor's cache: memory sees x and the result alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..._layout import empty_nchw
from ..._library import define, kernel
from .._conv import IntPair, out_size, packable, pair
from .op import pack_conv

_GEOMETRY = 10  # in and out channels; kernel, stride, padding and dilation, (h, w) each


def _fake_packed_fwd(x: Tensor, packed: Sequence[Tensor], geometry: Sequence[int], shortcut: bool, projects: bool) -> Tensor:
    channels, height, width = x.shape[1:]
    for i in range(len(packed) - projects):
        _, channels, kh, kw, sh, sw, ph, pw, dh, dw = geometry[_GEOMETRY * i : _GEOMETRY * (i + 1)]
        height, width = out_size(height, kh, sh, ph, dh), out_size(width, kw, sw, pw, dw)
    return empty_nchw(x, channels, height, width)


define(
    "residual_block_packed_fwd(Tensor x, Tensor[] packed, SymInt[] geometry, bool shortcut, bool projects) -> Tensor",
    _fake_packed_fwd,
)


class FoldedConv(NamedTuple):
    """A convolution with its BatchNorm folded in: weight (out, in, kh, kw) and bias (out,) in float32, and conv2d's geometry."""

    weight: Tensor
    bias: Tensor | None
    stride: IntPair = 1
    padding: IntPair = 0
    dilation: IntPair = 1
    groups: int = 1


class PackedResidualBlock(NamedTuple):
    """A block's weights in the layout that the native CPU convolution reads, and its shape; good on this machine only."""

    data: list[Tensor]
    geometry: list[int]
    shortcut: bool
    projects: bool


def pack_residual_block(
    convolutions: Sequence[FoldedConv],
    projection: FoldedConv | None,
    *,
    shortcut: bool,
    like: Tensor,
    backend: str | None = None,
) -> PackedResidualBlock | None:
    """The block to call residual_block with many times, without gradients, on inputs of `like`'s dtype and device.

    None where the native CPU convolution does not take it (another device or dtype, groups): then run one conv_bias_relu after the other.
    `shortcut` adds x, or its `projection` where that is given, before the last ReLU.
    """
    units = [*convolutions, *([projection] if projection else [])]
    if any(u.groups != 1 for u in units) or not packable(like, "conv_bias_relu_fwd", backend):
        return None
    packed = [pack_conv(u.weight, u.bias, like=like, stride=u.stride, dilation=u.dilation, backend=backend)[0] for u in units]
    geometry = [
        n
        for u in units
        for n in (u.weight.size(1), u.weight.size(0), *u.weight.shape[2:], *pair(u.stride), *pair(u.padding), *pair(u.dilation))
    ]
    return PackedResidualBlock([p.data for p in packed], geometry, shortcut, projection is not None)


def residual_block(x: Tensor, block: PackedResidualBlock) -> Tensor:
    """A whole residual block (arXiv 1512.03385, figures 2 and 5) in eval form.

    Args:
        x: (N, C, H, W), float32 or bfloat16 on the CPU, any strides.
        block: what pack_residual_block made of the block's convolutions.

    Returns:
        (N, out, H', W') of the last convolution, in x's dtype; channels_last where x's channels are adjacent. No gradients; nothing is
        mutated.

    Raises:
        RuntimeError: shapes, dtypes or the packed weights do not agree.
    """
    return kernel("residual_block_packed_fwd", "native")(x, *block)
