"""conv_bias_relu: out = relu(conv2d(x, weight) + bias + residual), with bias, residual and ReLU in the epilogue.

A 1x1 convolution is a matrix product over pixels, and has kernels of its own on every backend; conv1x1_bias_relu is its
public name. Forward reads x, weight and residual and writes out once; eager's addition and ReLU each read and write out
again. Backward masks grad_out and sums grad_bias in one pass, then computes the convolution's gradients.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._candidates import REFERENCE, Candidate, Measurement, offer, refuse_transforms, resolve, tunable
from ..._layout import empty_nchw, result_format
from ..._library import define, define_triton, kernel
from .._autograd import kernel_or, needs_grad, on_a_backend
from .._conv import (
    ConvGeometry,
    IntPair,
    autocast,
    check_conv,
    empty_result,
    is_pointwise,
    packable,
    pair,
    runs_on_gpu_kernels,
)
from .._flops import conv_flops, flop_formula
from . import reference


def _fake_bwd(grad_out: Tensor, out: Tensor | None, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The gradients (x, weight, bias, residual); an empty tensor for each that is not computed."""
    needs_x, needs_weight, needs_bias = rest[-3:]
    return (
        empty_nchw(x, *x.shape[1:]) if needs_x else grad_out.new_empty(0),
        torch.empty_like(weight, memory_format=result_format(weight)) if needs_weight else grad_out.new_empty(0),
        grad_out.new_empty(weight.size(0) if needs_bias else 0),
        grad_out.new_empty(0) if out is None else empty_nchw(out, *out.shape[1:]),
    )


define(
    "conv_bias_relu_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, SymInt groups, bool relu) -> Tensor",
    lambda x, weight, bias, residual, *geometry: empty_result(x, weight.shape, *geometry[:3]),
)
define(
    "conv_bias_relu_bwd(Tensor grad_out, Tensor? out, Tensor x, Tensor weight, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, SymInt groups, bool needs_x, bool needs_weight, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
)
define(
    "conv_bias_relu_pack(Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] dilation) -> Tensor",
    # The layout, and so the size, is the processor's affair.
    lambda weight, *_: weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8),
)
define(
    "conv_bias_relu_packed_fwd(Tensor x, Tensor packed, SymInt[] weight_shape, Tensor? residual, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, bool relu) -> Tensor",
    lambda x, packed, weight_shape, residual, *geometry: empty_result(x, weight_shape, *geometry[:3]),
)
define_triton("conv", "conv_bias_relu_fwd", "conv_bias_relu_bwd")


@flop_formula("conv_bias_relu_fwd")
def fwd_flops(x: Tensor, weight: Tensor, *rest: Any, out_val: Tensor) -> int:
    return conv_flops(out_val, weight.shape)


@flop_formula("conv_bias_relu_packed_fwd")
def packed_flops(x: Tensor, packed: Tensor, weight_shape: Sequence[int], *rest: Any, out_val: Tensor) -> int:
    return conv_flops(out_val, weight_shape)


@flop_formula("conv_bias_relu_bwd")
def bwd_flops(grad_out: Tensor, out: Tensor | None, x: Tensor, weight: Tensor, *rest: Any, out_val: Any) -> int:
    """PyTorch counts the gradient of a weight in groups as that of a full one."""
    *_, groups, needs_x, needs_weight, _ = rest
    return (needs_x + groups * needs_weight) * conv_flops(grad_out, weight.shape)


_H100, _H200 = ("H100", "2026-11-27"), ("H200", "2026-11-26")
_BF16 = "bfloat16, batch 256"
offer(
    "conv_bias_relu_fwd",
    Candidate(
        "native",
        measured=(
            Measurement(f"1x1, 256 -> 64 at 56 x 56, {_BF16}", "176 us, cuDNN's fused call 181", *_H100),
            Measurement(f"1x1, 64 -> 256 at 56 x 56, residual, {_BF16}", "341 us, cuDNN's fused call 483", *_H100),
            Measurement(f"7x7 stride 2, 3 -> 64 at 224 x 224, {_BF16}", "437 us, cuDNN's fused call 2063", *_H100),
        ),
    ),
    # For other kernels cuDNN is faster than Triton's implicit GEMM; products in float32 have not been timed.
    Candidate(
        "triton",
        when=lambda weight, padding, groups: is_pointwise(weight, padding, groups) and weight.itemsize == 2,
        measured=(
            Measurement(f"1x1, 256 -> 64 at 56 x 56, {_BF16}", "191 us, PyTorch's operators 322", *_H200),
            Measurement(f"1x1, 64 -> 256 at 56 x 56, residual, {_BF16}", "454 us, PyTorch's operators 1211", *_H200),
            Measurement(f"3x3, 64 -> 64 at 56 x 56, {_BF16}", "422 us, PyTorch's operators 325", *_H200),
        ),
    ),
    REFERENCE,
)


class PackedConv(NamedTuple):
    """A weight and bias in the layout that the native CPU convolution reads; good on this machine only, never to be
    saved."""

    data: Tensor
    shape: tuple[int, ...]  # (out, in, kh, kw)


def pack_conv(
    weight: Tensor,
    bias: Tensor | None,
    *,
    like: Tensor,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str | None = None,
) -> tuple[Tensor | PackedConv, Tensor | None]:
    """The weight and bias to call conv_bias_relu with many times, with this stride and dilation, without gradients, on
    inputs such as `like`.

    Packed where the native CPU convolution will run (the bias, kept in float32, is then inside); else both in `like`'s
    dtype, and channels_last where CUDA kernels may run, which copy others at every call.
    """
    if groups == 1 and weight.size(0) > 0 and packable(like, "conv_bias_relu_fwd", backend):
        data = kernel("conv_bias_relu_pack", "native")(weight.to(like.dtype), bias, pair(stride), pair(dilation))
        return PackedConv(data, weight.shape), None
    weight, bias = weight.to(like.dtype), None if bias is None else bias.to(like.dtype)
    if runs_on_gpu_kernels(like, "conv_bias_relu_fwd", backend):
        weight = weight.contiguous(memory_format=torch.channels_last)
    return weight, bias


class _ConvBiasReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        geometry: ConvGeometry,
        relu: bool,
        backend: str,
    ) -> Tensor:
        out = kernel("conv_bias_relu_fwd", backend)(x, weight, bias, residual, *geometry, relu)
        ctx.save_for_backward(x, weight, out if relu else None)
        ctx.geometry, ctx.backend = geometry, backend
        return out

    @staticmethod
    @on_a_backend
    def backward(ctx: Any, backend: str, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        gx, gw, gb, grad = kernel_or(reference.conv_bias_relu_bwd, "conv_bias_relu_bwd", backend)(
            grad_out, out, x, weight, *ctx.geometry, *needs[:3]
        )
        found = (gx, gw, gb, grad_out if out is None else grad)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None)


@tunable
def conv_bias_relu(
    x: Tensor,
    weight: Tensor | PackedConv,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    relu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """relu(conv2d(x, weight) + bias + residual); the ReLU, bias and residual are optional.

    Args:
        x: (N, C, H, W), floating point, any strides.
        weight: (out, C / groups, kh, kw), x's dtype and device; or what pack_conv made of it, bias included.
        bias: (out,), x's dtype, or None.
        residual: the result's shape, x's dtype, added before the ReLU, or None.
        stride, padding, dilation, groups: as torch.nn.functional.conv2d takes them.
        relu: False leaves the ReLU out.
        backend: "reference", "native", "triton", or None for the best at hand.

    Returns:
        (N, out, H', W') in x's dtype (autocast's where autocast is on); channels_last where x's channels are adjacent
        in memory.

    Saved for backward: x, weight and, with ReLU, the result. Nothing is mutated.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or geometry do not agree.
        BackendUnavailable: an explicit backend cannot run here.
    """
    geometry = ConvGeometry.of(stride, padding, dilation, groups)
    if isinstance(weight, PackedConv):
        refuse_transforms("conv_bias_relu with packed weights")
        return kernel("conv_bias_relu_packed_fwd", "native")(x, *weight, residual, *geometry[:3], relu)
    x, plain, bias, residual = autocast(x, weight, bias, residual)
    check_conv("conv_bias_relu", x, plain, bias, residual, geometry)
    backend = resolve("conv_bias_relu_fwd", backend, x, plain, geometry.padding, groups)
    if backend == "reference":
        return reference.conv_bias_relu(x, plain, bias, residual, *geometry, relu)
    inputs = (x, plain, bias, residual)
    if needs_grad(*inputs):
        return _ConvBiasReLU.apply(*inputs, geometry, relu, backend)
    return kernel("conv_bias_relu_fwd", backend)(*inputs, *geometry, relu)


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
    """relu(conv1x1(x, weight) + bias + residual): the Inception block's 1x1 reduction (arXiv 1409.4842, section 4) and
    the last convolution of a bottleneck with its shortcut (arXiv 1512.03385, figure 5).

    Args:
        weight: (out, C, 1, 1), x's dtype and device.
        stride: rows and columns of x that are read, as torch.nn.functional.conv2d takes it.
        x, bias, residual, relu, backend: conv_bias_relu's, as is what it returns, saves and raises; ValueError also
            where the kernel is not 1x1.
    """
    if weight.dim() == 4 and tuple(weight.shape[2:]) != (1, 1):
        raise ValueError(f"conv1x1_bias_relu: weight must be (out, in, 1, 1), got shape {tuple(weight.shape)}")
    return conv_bias_relu(x, weight, bias, residual, stride=stride, relu=relu, backend=backend)
