"""What the convolution rooms share: argument checks, the result's size, autocast, and fake results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._backends import usable
from .._candidates import ready, resolve_behind_graphs, transforms_active
from .._checks import check_nchw, check_same, check_vector
from .._layout import empty_nchw
from .._library import has_kernel

IntPair = int | tuple[int, int]


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(h, w) of an int or of one value for both, or of two, as PyTorch takes them."""
    if isinstance(value, int):
        return (value, value)
    if len(value) not in (1, 2):
        raise ValueError(f"expected one value or two (h, w), got {tuple(value)}")
    return (value[0], value[-1])


class ConvGeometry(NamedTuple):
    """What conv2d takes besides its tensors, (h, w) each."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, stride: IntPair, padding: IntPair, dilation: IntPair, groups: int) -> ConvGeometry:
        return cls(pair(stride), pair(padding), pair(dilation), groups)


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool = False) -> int:
    """One side of a convolution's or a pool's result, by PyTorch's rule: with ceil_mode, no window may start in the
    padding behind the image."""
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (reach + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def out_sides(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool = False) -> list[int]:
    """The result's height and width, of (h, w) pairs."""
    sides = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    return [out_size(*side, ceil_mode) for side in sides]


def is_pointwise(weight: Tensor, padding: Sequence[int], groups: int) -> bool:
    """Whether a convolution is a matrix product over (some of the) pixels."""
    return weight.size(2) == weight.size(3) == 1 and max(padding) == 0 and groups == 1


def on_16_bytes(t: Tensor) -> Tensor:
    """`t`, copied where it does not lie on 16 bytes on a GPU: cuDNN was seen to read such tensors 16 bytes at a time
    all the same. In torch.compile's trace that is the compiler's business; a transform's tensors have no address."""
    if t.device.type != "cuda" or torch.compiler.is_compiling() or transforms_active() or t.data_ptr() % 16 == 0:
        return t
    return t.clone()


def packable(like: Tensor, op: str, backend: str | None) -> bool:
    """Whether calls on inputs such as `like` will run on the native CPU convolution, whose weights are packed once."""
    if like.device.type != "cpu" or resolve_behind_graphs(op, backend, like) != "native":
        return False
    return like.dtype in (torch.float32, torch.bfloat16)


def runs_packed(like: Tensor, op: str, backend: str | None) -> bool:
    """Whether calls on inputs such as `like` will run as a native op on weights that are made ready once: on a CPU
    packed ones, on a GPU as its kernels like them best. In torch.compile's trace a GPU's are made in the graph."""
    if backend not in (None, "auto", "native"):
        return False
    if like.device.type == "cpu":
        return packable(like, op, backend)
    if like.device.type != "cuda" or transforms_active() or torch.compiler.is_compiling():
        return False
    return ready("native", like.device) and has_kernel(op, "native", "cuda")


def runs_on_gpu_kernels(like: Tensor, op: str, backend: str | None) -> bool:
    """Whether calls on inputs such as `like` may run on the CUDA kernels, which take weights as they are but like them
    channels_last, the parallel ones one below the other."""
    if like.device.type != "cuda" or backend not in (None, "auto", "native") or not has_kernel(op, "native", "cuda"):
        return False
    return usable("native", like.device)


def check_conv(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: ConvGeometry
) -> None:
    """Everything that a convolution must find in order, before any memory is touched."""
    stride, padding, dilation, groups = geometry
    check_nchw(op, "x", x)
    if weight.dim() != 4:
        raise ValueError(f"{op}: weight must have 4 dimensions (out, in, kh, kw), got shape {tuple(weight.shape)}")
    check_same(op, "x", x, "weight", weight, shape=False)
    out_channels, in_channels, kh, kw = weight.shape
    if out_channels < 1:
        raise ValueError(f"{op}: weight must have an output channel at least, got shape {tuple(weight.shape)}")
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
    height, width = out_sides(x, (kh, kw), stride, padding, dilation)
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
    return empty_nchw(x, weight_shape[0], *out_sides(x, weight_shape[2:], stride, padding, dilation))
