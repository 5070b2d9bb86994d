"""stem: out = max_pool2d(relu(conv2d(x, weight) + bias), 3, stride=2), a network's first layers in one kernel.

The convolution's result, the largest activation of a ResNet or a GoogLeNet, is never written: forward reads x and
writes a quarter of it. Backward computes it again.
"""

from typing import Any

import torch
from torch import Tensor

from ..._candidates import NATIVE, REFERENCE, offer, resolve, tunable
from ..._layout import empty_nchw
from ..._library import define, kernel
from .._autograd import kernel_or, needs_grad, on_a_backend
from .._conv import ConvGeometry, IntPair, autocast, check_conv, out_sides, out_size
from .._flops import conv_flops, flop_formula
from ..conv.op import conv_bias_relu
from ..conv.reference import conv_bias_relu_bwd
from ..max_pool.op import Pooled, max_pool2d
from . import reference

Pair = tuple[int, int]
ONES: Pair = (1, 1)


def _sides(x: Tensor, weight: Tensor, stride: Any, padding: Any) -> list[int]:
    """The convolution's height and width."""
    return out_sides(x, weight.shape[2:], stride, padding, ONES)


def _pooled(sides: list[int], pool_padding: int, ceil_mode: bool) -> list[int]:
    return [
        out_size(side, kernel, step, pool_padding, dilation, ceil_mode)
        for side, kernel, step, dilation in zip(sides, *reference.POOL, strict=True)
    ]


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, pool_padding: int, ceil_mode: bool
) -> Tensor:
    return empty_nchw(x, weight.size(0), *_pooled(_sides(x, weight, stride, padding), pool_padding, ceil_mode))


define(
    "stem_fwd(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, int pool_padding, "
    "bool ceil_mode) -> Tensor",
    _fake,
)
offer("stem_fwd", NATIVE, REFERENCE)


@flop_formula("stem_fwd")
def fwd_flops(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, *rest: Any, out_val: Tensor
) -> int:
    convolution = torch.empty(x.size(0), weight.size(0), *_sides(x, weight, stride, padding), device="meta")
    return conv_flops(convolution, weight.shape)


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, pool: Any, backend: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.geometry, ctx.pool, ctx.backend = geometry, pool, backend
        return kernel("stem_fwd", backend)(x, weight, bias, geometry.stride, geometry.padding, *pool)

    @staticmethod
    @on_a_backend
    def backward(ctx: Any, backend: str, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        pool_padding, ceil_mode = ctx.pool
        size, step, dilation = reference.POOL
        y = conv_bias_relu(x, weight, bias, **ctx.geometry._asdict(), backend=backend)
        window = (size, step, (pool_padding, pool_padding), dilation, ceil_mode)
        grad = Pooled.of(y, backend, window).gradient(grad_out, backend)
        needs = ctx.needs_input_grad[:3]
        grads = kernel_or(conv_bias_relu_bwd, "conv_bias_relu_bwd", backend)(grad, y, x, weight, *ctx.geometry, *needs)
        return (*(g if need else None for g, need in zip(grads, needs, strict=False)), None, None, None)


@tunable
def stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: IntPair = 2,
    padding: IntPair = 3,
    pool_padding: int = 1,
    ceil_mode: bool = False,
    backend: str | None = None,
) -> Tensor:
    """max_pool2d(relu(conv2d(x, weight) + bias), kernel_size=3, stride=2): the first layers of ResNet (arXiv
    1512.03385, table 1) and of GoogLeNet (arXiv 1409.4842, table 1), BatchNorm folded.

    Args:
        x: (N, C, H, W), floating point, any strides. On a GPU one kernel of the project's own runs both where C is at
            most 3, the weight 7x7, the stride 2, the dtype float16 or bfloat16, and the number of outputs a multiple
            of 8; else the convolution's best kernel and the pool's.
        weight: (out, C, kh, kw), x's dtype and device.
        bias: (out,), x's dtype, or None.
        stride, padding: the convolution's, as torch.nn.functional.conv2d takes them.
        pool_padding: 0 or 1, as torch.nn.functional.max_pool2d takes it.
        ceil_mode: the pool's.
        backend: "reference", "native" (on a GPU), or None for the best at hand: elsewhere conv_bias_relu and
            max_pool2d.

    Returns:
        (N, out, H', W') in x's dtype (autocast's where autocast is on); channels_last where x's channels are adjacent
        in memory.

    Saved for backward: x, weight and bias; the convolution's result is computed again. Nothing is mutated.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or geometry do not agree.
        BackendUnavailable: an explicit backend cannot run here.
    """
    geometry = ConvGeometry.of(stride, padding, 1, 1)
    x, weight, bias = autocast(x, weight, bias)
    check_conv("stem", x, weight, bias, None, geometry)
    if pool_padding not in (0, 1):
        raise ValueError(f"stem: pool_padding must be 0 or 1, got {pool_padding!r}")
    sides = _sides(x, weight, geometry.stride, geometry.padding)
    if min(_pooled(sides, pool_padding, ceil_mode)) < 1:
        raise ValueError(f"stem: no window (3, 3) of the pool fits the convolution's result of size {tuple(sides)}")
    chosen = resolve("stem_fwd", backend, x)
    if chosen == "reference" and backend in (None, "auto"):
        y = conv_bias_relu(x, weight, bias, stride=geometry.stride, padding=geometry.padding)
        return max_pool2d(y, 3, 2, pool_padding, ceil_mode=ceil_mode)
    if chosen == "reference":
        return reference.stem(x, weight, bias, geometry.stride, geometry.padding, pool_padding, ceil_mode)
    if needs_grad(x, weight, bias):
        return _Stem.apply(x, weight, bias, geometry, (pool_padding, ceil_mode), chosen)
    return kernel("stem_fwd", chosen)(x, weight, bias, geometry.stride, geometry.padding, pool_padding, ceil_mode)
