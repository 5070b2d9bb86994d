"""What the convolution rooms share: argument checks, the result's size, autocast, and fake results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._candidates import resolve
from .._checks import check_nchw, check_same, check_vector
from .._layout import empty_nchw, result_format

IntPair = int | tuple[int, int]


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(v, v) for an int, as torch.nn.Conv2d takes them."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """One spatial side of a convolution's result."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def is_pointwise(weight: Tensor, padding: Sequence[int], groups: int) -> bool:
    """Whether a convolution is a matrix product over (some of the) pixels."""
    return weight.size(2) == weight.size(3) == 1 and max(padding) == 0 and groups == 1


def on_16_bytes(t: Tensor) -> Tensor:
    """`t`, copied where it does not lie on 16 bytes on a GPU: cuDNN was seen to read such tensors 16 bytes at a time
    all the same. In torch.compile's trace that is the compiler's business."""
    if t.device.type != "cuda" or torch.compiler.is_compiling() or t.data_ptr() % 16 == 0:
        return t
    return t.clone()


def packable(like: Tensor, op: str, backend: str | None) -> bool:
    """Whether calls on inputs such as `like` will run on the native CPU convolution, whose weights are packed once."""
    if like.device.type != "cpu" or resolve(op, backend, like) != "native":
        return False
    return like.dtype in (torch.float32, torch.bfloat16)


def check_conv(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> None:
    """Everything that a convolution must find in order, before any memory is touched."""
    check_nchw(op, "x", x)
    if weight.dim() != 4:
        raise ValueError(f"{op}: weight must have 4 dimensions (out, in, kh, kw), got shape {tuple(weight.shape)}")
    check_same(op, "x", x, "weight", weight, shape=False)
    out_channels, in_channels, kh, kw = weight.shape
    if groups < 1 or out_channels % groups or in_channels * groups != x.size(1):
        raise ValueError(
            f"{op}: x has {x.size(1)} channels; a weight of shape {tuple(weight.shape)} with groups={groups} "
            f"takes {in_channels * groups}, and groups must divide {out_channels}"
        )
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f"{op}: stride and dilation must be at least 1 and padding at least 0, "
            f"got stride={stride}, padding={padding}, dilation={dilation}"
        )
    height = out_size(x.size(2), kh, stride[0], padding[0], dilation[0])
    width = out_size(x.size(3), kw, stride[1], padding[1], dilation[1])
    if height < 1 or width < 1:
        raise ValueError(f"{op}: kernel ({kh}, {kw}) is larger than the padded input of shape {tuple(x.shape)}")
    check_vector(op, "bias", bias, out_channels, x)
    if bias is not None:
        check_same(op, "x", x, "bias", bias, shape=False)
    if residual is not None:
        check_same(op, "x", x, "residual", residual, shape=False)
        expected = (x.size(0), out_channels, height, width)
        if tuple(residual.shape) != expected:
            raise ValueError(f"{op}: residual must have the result's shape {expected}, got {tuple(residual.shape)}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives convolutions on x's device; None where it is off."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on for x's device, as PyTorch's own convolutions take them."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return (x, *others)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others))


def empty_result(x: Tensor, weight_shape: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """A convolution's result, uninitialised: what the fake kernels return."""
    out_channels, _, kh, kw = weight_shape
    height = out_size(x.size(2), kh, stride[0], padding[0], dilation[0])
    width = out_size(x.size(3), kw, stride[1], padding[1], dilation[1])
    return empty_nchw(x, out_channels, height, width)


def empty_gradients(
    grad_out: Tensor, out: Tensor | None, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients (x, weight, bias, residual), uninitialised; an empty tensor for each that is not computed."""
    return (
        torch.empty_like(x, memory_format=result_format(x)) if needs_x else grad_out.new_empty(0),
        torch.empty_like(weight, memory_format=result_format(weight)) if needs_weight else grad_out.new_empty(0),
        grad_out.new_empty(weight.size(0)) if needs_bias else grad_out.new_empty(0),
        grad_out.new_empty(0) if out is None else empty_nchw(out, *out.shape[1:]),
    )
