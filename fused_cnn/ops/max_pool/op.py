"""max_pool2d without indices: forward reads x once and writes the result; PyTorch also writes an int64 index an
element.

Backward searches each window of x again (native float16 and float64 on a CPU: by PyTorch's pool; on a GPU it is
Triton's), so that no indices are saved in between.
"""

from typing import Any

import torch
from torch import Tensor

from ..._candidates import REFERENCE, Candidate, Measurement, best, offer, resolve, tunable
from ..._checks import check_nchw
from ..._layout import empty_nchw
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
define_triton("max_pool", "max_pool2d_fwd", "max_pool2d_bwd")

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


def gradient(grad_out: Tensor, x: Tensor, *window: Any, backend: str) -> Tensor:
    """x's gradient, by the backend or, where that has no kernel for it, by the best that has."""
    if backend != "reference" and not has_kernel("max_pool2d_bwd", backend, x.device.type):
        backend = best("max_pool2d_bwd", x.device, x.dtype)
    taps = window[0][0] * window[0][1]  # Triton keeps an index as one byte
    if not (taps <= 255 if backend == "triton" else x.dtype in (torch.float32, torch.bfloat16)):
        backend = "reference"
    grad: Tensor = kernel_or(reference.max_pool2d_bwd, "max_pool2d_bwd", backend)(grad_out, x, *window)
    return grad


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str, *window: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.window, ctx.backend = window, backend
        return kernel("max_pool2d_fwd", backend)(x, *window)

    @staticmethod
    @on_a_backend
    def backward(ctx: Any, backend: str, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return (gradient(grad_out, x, *ctx.window, backend=backend), *[None] * 6)


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

    Saved for backward: x, which the layer before keeps anyway. Nothing is mutated.

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
