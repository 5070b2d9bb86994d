"""bn_relu_conv: conv2d(relu(bn(x)), weight), whose backward normalises x again instead of keeping what the convolution
read.

Between two convolutions of a block eager PyTorch saves x (for BatchNorm's gradient) and relu(bn(x)) (for the
convolution's). The second costs one pass over x to make again, a small part of the convolution's own work, so only x is
saved: a third of a bottleneck's activations.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._candidates import resolve, tunable
from ..._checks import check_nchw
from ..._library import kernel
from .._autograd import kernel_or, needs_grad, on_a_backend
from .._conv import ConvGeometry, IntPair, autocast, autocast_dtype, check_conv, on_16_bytes
from . import reference
from .args import BatchNormArgs
from .op import check_args, normalise, vectors
from .statistics import statistics


class _BNReLUConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, training: tuple[bool, ...], geometry: ConvGeometry, *tensors: Any) -> Tensor:
        mean, rstd, x, bn_weight, bn_bias, weight, bias = tensors
        y = kernel("bn_relu_concat_fwd", backend)([x], mean, rstd, [bn_weight], [bn_bias], True)
        ctx.backend, ctx.training, ctx.geometry = backend, training, geometry
        ctx.bias_sizes = None if bias is None else [bias.size(0)]
        ctx.save_for_backward(mean, rstd, x, bn_weight, bn_bias, weight)
        return F.conv2d(y.to(weight.dtype), on_16_bytes(weight), bias, *geometry)

    @staticmethod
    @on_a_backend
    def backward(ctx: Any, backend: str, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        mean, rstd, x, bn_weight, bn_bias, weight = ctx.saved_tensors
        bn = ([x], mean, rstd, [bn_weight], [bn_bias])
        if backend == "reference":
            (branch,) = reference.normalised(*bn, ctx.training)
            y = torch.relu(branch.out.to(x.dtype))
        else:
            y = kernel("bn_relu_concat_fwd", backend)(*bn, True)
        y = y.to(weight.dtype)  # autocast's, where that was on
        *geometry, groups = ctx.geometry
        needs = [any(ctx.needs_input_grad[5:8]), *ctx.needs_input_grad[8:]]
        grad_y, *grads = torch.ops.aten.convolution_backward(
            on_16_bytes(grad_out), y, on_16_bytes(weight), ctx.bias_sizes, *geometry, False, [0, 0], groups, needs
        )
        if not needs[0]:
            return (*[None] * 8, *grads)
        backward = kernel_or(reference.bn_relu_concat_bwd, "bn_relu_concat_bwd", backend)
        (grad_x,), *bn_grads = backward(grad_y.to(x.dtype), *bn, ctx.training, True)
        return (*[None] * 5, grad_x, *bn_grads, *grads)


@tunable
def bn_relu_conv(
    x: Tensor,
    bn: BatchNormArgs,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """conv2d(relu(bn(x)), weight) + bias, for training: BatchNorm and ReLU of one layer and the convolution of the
    next.

    Args:
        x: (N, C, H, W), the raw output of the convolution before, floating point, any strides.
        bn: what x's normalisation needs.
        weight: (out, C / groups, kh, kw), x's dtype and device.
        bias: (out,), x's dtype, or None. Under autocast, whose dtype the convolution runs in, neither need have x's.
        stride, padding, dilation, groups: of the convolution, as torch.nn.functional.conv2d takes them.
        backend: of BatchNorm and ReLU; the convolution is cuDNN's or oneDNN's. "reference", "native", or None for the
            best at hand.

    Returns:
        (N, out, H', W') in x's dtype (autocast's where autocast is on), in the layout that torch.nn.functional.conv2d
        gives.

    Saved for backward: x, weight and two vectors; relu(bn(x)) is computed again (arXiv 1604.06174, section 3: trading
    computation for memory). Mutated: the running statistics in training.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or geometry do not agree; in training there is one value per
            channel.
        BackendUnavailable: an explicit backend cannot run here.
    """
    geometry = ConvGeometry.of(stride, padding, dilation, groups)
    check_nchw("bn_relu_conv", "x", x)
    check_args("bn_relu_conv", "", x, bn)
    like = x
    if autocast_dtype(x) is not None:
        like, weight, bias = autocast(x.new_empty(1), weight, bias)
        like = like.expand(x.shape)  # what the convolution will read
    check_conv("bn_relu_conv", like, weight, bias, None, geometry)
    backend = resolve("bn_relu_concat_fwd", backend, x)
    if backend == "reference" or not needs_grad(x, bn.weight, bn.bias, weight, bias):
        y = normalise([x], [bn], True, backend)
        return F.conv2d(y, weight if backend == "reference" else on_16_bytes(weight), bias, *geometry)
    mean, rstd = statistics([x], [bn], backend)
    return _BNReLUConv.apply(backend, (bn.training,), geometry, mean, rstd, x, *vectors([x], [bn]), weight, bias)
