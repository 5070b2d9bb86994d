"""conv1x1_bias_relu: out = relu(conv1x1(x, weight) + bias + residual), a matrix product over pixels with its epilogue.

It is the Inception block's 1x1 reduction and, with a residual, the end of a bottleneck. Forward reads x, weight and residual and writes out
once. Backward masks grad_out and sums grad_bias in one pass before the two matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._backends import resolve
from ..._library import define, define_triton, kernel
from ...tuning import tunable
from .._autograd import differentiable_once
from .._conv import IntPair, autocast, check_conv, empty_gradients, empty_result, pair
from . import reference


def _fake_fwd(x, weight, bias, residual, stride, relu):  # type: ignore[no-untyped-def]
    return empty_result(x, weight.shape, stride, (0, 0), (1, 1))


def _fake_bwd(grad_out, out, x, weight, stride, needs_x, needs_weight, needs_bias):  # type: ignore[no-untyped-def]
    return empty_gradients(grad_out, out, x, weight, needs_x, needs_weight, needs_bias)


define(
    "conv1x1_bias_relu_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] stride, bool relu) -> Tensor",
    _fake_fwd,
)
define(
    "conv1x1_bias_relu_bwd(Tensor grad_out, Tensor? out, Tensor x, Tensor weight, SymInt[] stride, "
    "bool needs_x, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
)
define_triton("conv1x1_bias_relu", "conv1x1_bias_relu_fwd", "conv1x1_bias_relu_bwd")


class _Conv1x1BiasReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, stride, relu, backend):  # type: ignore[no-untyped-def]
        out = kernel("conv1x1_bias_relu_fwd", backend)(x, weight, bias, residual, stride, relu)
        ctx.save_for_backward(x, weight, out if relu else None)
        ctx.stride, ctx.backend = stride, backend
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        gx, gw, gb, grad = kernel("conv1x1_bias_relu_bwd", ctx.backend)(
            grad_out, out, x, weight, ctx.stride, *needs[:3]
        )
        found = (gx, gw, gb, grad_out if out is None else grad)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None)


@tunable
def conv1x1_bias_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: IntPair = 1,
    relu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """relu(conv1x1(x, weight) + bias + residual): the Inception block's 1x1 reduction (arXiv 1409.4842, section 4) and the last
    convolution of a bottleneck with its shortcut (arXiv 1512.03385, figure 5).

    Args:
        x: (N, C, H, W), floating point, any strides.
        weight: (out, C, 1, 1), x's dtype and device.
        bias: (out,), x's dtype, or None.
        residual: the result's shape, x's dtype, added before the ReLU, or None.
        stride: rows and columns of x that are read, as torch.nn.functional.conv2d takes it.
        relu: False leaves the ReLU out.
        backend: "reference", "native", "triton", or None for the best at hand.

    Returns:
        (N, out, H', W') in x's dtype (autocast's where autocast is on); channels_last where x's channels are adjacent in memory.

    Saved for backward: x, weight and, with ReLU, the result. Nothing is mutated. Differentiable once (the reference: twice).

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not agree, or the kernel is not 1x1.
        BackendUnavailable: an explicit backend cannot run here.
    """
    x, weight, bias, residual = autocast(x, weight, bias, residual)
    step = pair(stride)
    check_conv("conv1x1_bias_relu", x, weight, bias, residual, step, (0, 0), (1, 1), 1)
    if tuple(weight.shape[2:]) != (1, 1):
        raise ValueError(f"conv1x1_bias_relu: weight must be (out, in, 1, 1), got shape {tuple(weight.shape)}")
    backend = resolve("conv1x1_bias_relu_fwd", backend, x)
    if backend == "reference":
        return reference.conv1x1_bias_relu(x, weight, bias, residual, step, relu)
    inputs = (x, weight, bias, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Conv1x1BiasReLU.apply(*inputs, step, relu, backend)
    return kernel("conv1x1_bias_relu_fwd", backend)(*inputs, step, relu)
