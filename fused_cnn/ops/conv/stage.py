"""residual_stage: ResNet's residual blocks one after the other in eval form (BatchNorm folded), as one op.

    block(x) = relu(conv_n(... relu(conv_1(x))) + shortcut(x))

The native form of what is otherwise one conv_bias_relu after the other. On a CPU a few images at a time go through all
the blocks, so that what lies between the convolutions stays in the processor's cache: memory sees x and the result
alone. On a GPU one call launches the kernels of all blocks, which the host could not do one by one as fast as they run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from ..._candidates import measuring, refuse_transforms
from ..._layout import empty_nchw
from ..._library import define, kernel
from .._conv import IntPair, out_size, pair, runs_packed
from .._flops import flop_formula
from .op import PackedConv, conv_bias_relu, pack_conv

GEOMETRY = 10  # in and out channels; kernel, stride, padding and dilation, (h, w) each


def _results(height: int, width: int, geometry: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Of convolutions one after the other: the result's height, width and channels, and the weights of a channel."""
    for i in range(0, len(geometry), GEOMETRY):
        channels, out, kh, kw, sh, sw, ph, pw, dh, dw = geometry[i : i + GEOMETRY]
        height, width = out_size(height, kh, sh, ph, dh), out_size(width, kw, sw, pw, dw)
        yield height, width, out, channels * kh * kw


def fake_stage(x: Tensor, geometry: Sequence[int], lengths: Sequence[int], shortcut: bool, projects: bool) -> Tensor:
    """The result's shape and layout."""
    channels, height, width = x.shape[1:]
    results = _results(height, width, geometry[: len(geometry) - GEOMETRY * projects])
    *_, (height, width, channels, _) = ((height, width, channels, 0), *results)
    return empty_nchw(x, channels, height, width)


define(
    # int, not SymInt, of which each takes as long as five: a convolution's geometry is never dynamic.
    "residual_stage_packed_fwd(Tensor x, Tensor[] packed, int[] geometry, int[] lengths, bool shortcut, bool projects) "
    "-> Tensor",
    lambda x, packed, *rest: fake_stage(x, *rest),
)


@flop_formula("residual_stage_packed_fwd")
def stage_flops(x: Tensor, packed: Sequence[Tensor], geometry: Sequence[int], *rest: Any, out_val: Tensor) -> int:
    """Of all convolutions in order; a projection, which stands last, reads the first one's input."""
    n, _, height, width = x.shape
    last = GEOMETRY * sum(rest[0])
    results = (*_results(height, width, geometry[:last]), *_results(height, width, geometry[last:]))
    return sum(2 * n * out * height * width * weights for height, width, out, weights in results)


class FoldedConv(NamedTuple):
    """A convolution with its BatchNorm folded in: weight (out, in, kh, kw) and bias (out,) in float32, and conv2d's
    geometry."""

    weight: Tensor
    bias: Tensor | None
    stride: IntPair = 1
    padding: IntPair = 0
    dilation: IntPair = 1
    groups: int = 1


def sum_of(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Of two biases."""
    return b if a is None else a if b is None else a + b


class PackedResidualStage(NamedTuple):
    """The weights of residual blocks as the native kernels read them, and their shapes; good on this machine only.

    `data` and `geometry` hold the convolutions in order, then the first block's projection; `lengths` counts each
    block's convolutions. In `data` a convolution is one tensor of bytes on a CPU, and on a GPU its weight,
    channels_last, and its bias, which is empty where there is none.
    """

    data: list[Tensor]
    geometry: list[int]
    lengths: list[int]
    shortcut: bool
    projects: bool

    def then(self, block: PackedResidualStage) -> PackedResidualStage:
        """This, with one more block behind it, which must add its own input."""
        assert len(block.lengths) == 1 and block.shortcut and not block.projects
        ints = len(self.geometry) - GEOMETRY * self.projects
        split = len(self.data) * ints // len(self.geometry)
        return self._replace(
            data=[*self.data[:split], *block.data, *self.data[split:]],
            geometry=[*self.geometry[:ints], *block.geometry, *self.geometry[ints:]],
            lengths=[*self.lengths, *block.lengths],
        )


def pack_residual_block(
    convolutions: Sequence[FoldedConv],
    projection: FoldedConv | None,
    *,
    shortcut: bool,
    like: Tensor,
    backend: str | None = None,
) -> PackedResidualStage | None:
    """A stage of one block, to call residual_stage with many times, without gradients, on inputs of `like`'s dtype and
    device.

    None where no native kernel takes it (another device or dtype, groups): then run one conv_bias_relu after the other.
    `shortcut` adds x, or its `projection` where that is given, before the last ReLU.
    """
    units = [*convolutions, *([projection] if projection else [])]
    if any(u.groups != 1 for u in units) or not runs_packed(like, "residual_stage_packed_fwd", backend):
        return None
    if like.is_cuda and projection is not None:
        # Its bias is added with the last convolution's: without one the library's result needs no pass behind it.
        last = units[-2]
        units[-2:] = last._replace(bias=sum_of(last.bias, projection.bias)), projection._replace(bias=None)
    data: list[Tensor] = []
    geometry: list[int] = []
    for u in units:
        how: Any = {"stride": u.stride, "dilation": u.dilation, "backend": backend}
        weight, bias = pack_conv(u.weight, u.bias, like=like, **how)
        if isinstance(weight, PackedConv):
            data.append(weight.data)
        else:
            data += [weight, like.new_empty(0) if bias is None else bias]
        pairs = (pair(u.stride), pair(u.padding), pair(u.dilation))
        geometry += [u.weight.size(1), u.weight.size(0), *u.weight.shape[2:], *chain(*pairs)]
    return PackedResidualStage(data, geometry, [len(convolutions)], shortcut, projection is not None)


def _one_by_one(x: Tensor, stage: PackedResidualStage) -> Tensor:
    """A GPU's stage as calls of conv_bias_relu."""

    def conv(i: int, y: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
        weight, bias = stage.data[2 * i : 2 * i + 2]
        stride, padding, dilation = (tuple(stage.geometry[GEOMETRY * i + at :][:2]) for at in (4, 6, 8))
        window: Any = {"stride": stride, "padding": padding, "dilation": dilation}
        return conv_bias_relu(y, weight, bias if bias.numel() else None, residual, **window, relu=relu)

    at = 0
    for block, length in enumerate(stage.lengths):
        y, last = x, at + length - 1
        for i in range(at, last):
            y = conv(i, y)
        projected = block == 0 and stage.projects
        shortcut = conv(len(stage.data) // 2 - 1, x, relu=False) if projected else x
        x, at = conv(last, y, shortcut if projected or block > 0 or stage.shortcut else None), last + 1
    return x


def residual_stage(x: Tensor, stage: PackedResidualStage) -> Tensor:
    """Whole residual blocks (arXiv 1512.03385, figures 2 and 5), one after the other, in eval form.

    Args:
        x: (N, C, H, W), float32 or bfloat16 on a CPU, any floating point on a GPU; any strides.
        stage: what pack_residual_block made of a block's convolutions, and `then` of more blocks that keep their
            input's shape.

    Returns:
        (N, out, H', W') of the last convolution, in x's dtype; channels_last where x's channels are adjacent. No
        gradients; nothing is mutated.

    Raises:
        RuntimeError: shapes, dtypes or the packed weights do not agree.
        BackendUnavailable: under a transform of torch.func or a forward-mode derivative.
    """
    refuse_transforms("residual_stage")
    if measuring.record is not None and x.is_cuda:  # `tune` measures the parts, whose tiles are the op's
        return _one_by_one(x, stage)
    return kernel("residual_stage_packed_fwd", "native")(x, *stage)
