"""max_pool2d without int64 indices: forward reads x once and writes the result; PyTorch also writes an index for each.

Backward: on a GPU a byte an element of the result, which forward writes where a gradient will be asked for, tells the
place in the window, and x need not be kept. On a CPU each window of x is searched again (float16 and float64: by
PyTorch's pool).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._candidates import REFERENCE, Candidate, Measurement, offer, resolve, tunable
from ..._checks import check_nchw
from ..._layout import empty_nchw, result_format
from ..._library import define, define_triton, has_kernel, kernel
from .._autograd import kernel_or, needs_grad, on_a_backend
from .._conv import IntPair, out_sides, pair
from . import reference

define(
    "max_pool2d_fwd(Tensor x, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool ceil_mode) "
    "-> Tensor",
    lambda x, *window: empty_nchw(x, x.size(1), *out_sides(x, *window)),
)
define(
    "max_pool2d_bwd(Tensor grad_out, Tensor x, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "bool ceil_mode) -> Tensor",
    lambda grad_out, x, *window: empty_nchw(x, *x.shape[1:]),
)
define(
    "max_pool2d_index_fwd(Tensor x, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "bool ceil_mode) -> (Tensor, Tensor)",
    lambda x, *window: _fake_index(x, out_sides(x, *window)),
)
define(
    "max_pool2d_index_bwd(Tensor grad_out, Tensor index, SymInt[] size, SymInt[] kernel, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, bool ceil_mode) -> Tensor",
    lambda grad_out, index, size, *window: empty_nchw(grad_out, grad_out.size(1), *size),
)
define_triton("max_pool", "max_pool2d_fwd", "max_pool2d_index_fwd", "max_pool2d_index_bwd")


def _fake_index(x: Tensor, sides: Sequence[int]) -> tuple[Tensor, Tensor]:
    out = empty_nchw(x, x.size(1), *sides)
    return out, torch.empty(out.shape, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)


MOST_TAPS = 255  # of a window whose places are bytes

_BF16 = "bfloat16, batch 256"
_H100, _H200 = ("H100", "2026-11-27"), ("H200", "2026-11-26")
offer(
    "max_pool2d_fwd",
    Candidate(
        "native",
        measured=(
            Measurement(f"3x3 stride 2, 64 at 112 x 112, {_BF16}", "196 us, Triton 308, PyTorch 862", *_H100),
            Measurement(f"3x3 stride 1, 480 at 14 x 14, {_BF16}", "46 us, Triton 151, PyTorch 328", *_H100),
        ),
    ),
    Candidate(
        "triton",
        measured=(
            Measurement(f"3x3 stride 2, 64 at 112 x 112, {_BF16}", "305 us, PyTorch 825", *_H200),
            Measurement(f"3x3 stride 1, 480 at 14 x 14, {_BF16}", "151 us, PyTorch 315", *_H200),
        ),
    ),
    REFERENCE,
)


def keeps_places(backend: str, device_type: str, kernel: Sequence[int]) -> bool:
    """Whether a backend's forward says for each window where its maximum is, so that backward need not search."""
    return kernel[0] * kernel[1] <= MOST_TAPS and has_kernel("max_pool2d_index_fwd", backend, device_type)


class Pooled(NamedTuple):
    """A pool's result, and what its gradient is made of."""

    out: Tensor
    source: Tensor  # the places in the windows, or x itself
    window: tuple[Any, ...]  # kernel, stride, padding, dilation and ceil_mode
    size: tuple[int, int]  # of x
    format: torch.memory_format  # of x's gradient

    @classmethod
    def of(cls, x: Tensor, backend: str, window: tuple[Any, ...]) -> "Pooled":
        how = (window, (x.size(2), x.size(3)), result_format(x))
        if keeps_places(backend, x.device.type, window[0]):
            out, index = kernel("max_pool2d_index_fwd", backend)(x, *window)
            return cls(out, index, *how)
        if backend == "reference" or not has_kernel("max_pool2d_bwd", backend, x.device.type):
            return cls(reference.max_pool2d(x, *window), x, *how)
        return cls(kernel("max_pool2d_fwd", backend)(x, *window), x, *how)

    def gradient(self, grad_out: Tensor, backend: str) -> Tensor:
        """x's, by the backend whose forward made this, or by PyTorch's operators ("reference"), which have derivatives
        of their own."""
        source = self.source
        if source.dtype == torch.uint8:
            if backend == "reference":
                return reference.max_pool2d_index_bwd(grad_out, source, self.size, *self.window)
            found = kernel("max_pool2d_index_bwd", backend)(grad_out, source, self.size, *self.window)
            return found.contiguous(memory_format=self.format)
        has = has_kernel("max_pool2d_bwd", backend, source.device.type)
        chosen = backend if has and source.dtype in (torch.float32, torch.bfloat16) else "reference"
        grad: Tensor = kernel_or(reference.max_pool2d_bwd, "max_pool2d_bwd", chosen)(grad_out, source, *self.window)
        return grad


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str, *window: Any) -> Tensor:
        pooled = Pooled.of(x, backend, window)
        ctx.save_for_backward(pooled.source)
        ctx.how, ctx.backend = pooled[2:], backend
        return pooled.out

    @staticmethod
    @on_a_backend
    def backward(ctx: Any, backend: str, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (source,) = ctx.saved_tensors
        return (Pooled(grad_out, source, *ctx.how).gradient(grad_out, backend), *[None] * 6)


@tunable
def max_pool2d(
    x: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    ceil_mode: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.max_pool2d, without its indices.

    Args:
        x: (N, C, H, W), floating point, any strides.
        kernel_size, stride, padding, dilation, ceil_mode: as torch.nn.functional.max_pool2d takes them.
        backend: "reference", "native", "triton", or None for the best at hand.

    Returns:
        (N, C, H', W') in x's dtype; channels_last where x's channels are adjacent in memory, else contiguous.

    Saved for backward: on a GPU a byte an element of the result, so that a gradient that will be differentiated again
    has its history in grad_out alone; else x, which the layer before keeps anyway. Nothing is mutated.

    Raises:
        ValueError, TypeError: x is not a floating-point (N, C, H, W) tensor, or the window does not fit.
        BackendUnavailable: an explicit backend cannot run here.
    """
    check_nchw("max_pool2d", "x", x)
    if min(x.shape[1:]) < 1:
        raise ValueError(f"max_pool2d: x must have a channel and a pixel at least, got shape {tuple(x.shape)}")
    k, p, d = pair(kernel_size), pair(padding), pair(dilation)
    s = pair(stride) if isinstance(stride, int) or stride else k  # PyTorch takes () for None, too
    if min(*k, *s, *d) < 1 or min(p) < 0 or any(2 * p[i] > k[i] for i in range(2)):
        raise ValueError(
            "max_pool2d: kernel_size, stride and dilation must be at least 1 and padding at most half the kernel, "
            f"got kernel_size={k}, stride={s}, padding={p}, dilation={d}"
        )
    if min(out_sides(x, k, s, p, d, ceil_mode)) < 1:
        raise ValueError(f"max_pool2d: no window {k} fits the padded input of shape {tuple(x.shape)}")
    backend = resolve("max_pool2d_fwd", backend, x)
    if backend == "reference":
        return reference.max_pool2d(x, k, s, p, d, ceil_mode)
    if needs_grad(x):
        return _MaxPool2d.apply(x, backend, k, s, p, d, ceil_mode)
    return kernel("max_pool2d_fwd", backend)(x, k, s, p, d, ceil_mode)
