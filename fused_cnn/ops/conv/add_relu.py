"""add_relu: the residual epilogue out = relu(x + residual), in one pass.

Forward reads two tensors and writes one (eager: reads three, writes two). Backward reads grad_out and out and writes
one gradient, which x and residual share.
"""

from typing import Any

import torch
from torch import Tensor

from ..._candidates import NATIVE, REFERENCE, TRITON, Candidate, Measurement, offer, resolve, tunable
from ..._checks import check_nchw, check_same
from ..._layout import empty_nchw
from ..._library import define, define_triton, kernel
from .._autograd import kernel_or, needs_grad, on_a_backend
from . import reference

define("add_relu_fwd(Tensor x, Tensor residual) -> Tensor", lambda x, residual: empty_nchw(x, *x.shape[1:]))
define("add_relu_bwd(Tensor grad_out, Tensor out) -> Tensor", lambda grad_out, out: empty_nchw(out, *out.shape[1:]))
define_triton("conv", "add_relu_fwd", "add_relu_bwd")
LARGE = 1 << 24  # elements; of smaller tensors Triton's launch from Python takes longer than it saves
_H200 = ("H200", "2026-11-26")
offer(
    "add_relu_fwd",
    Candidate(
        "triton",
        when=lambda elements: elements >= LARGE,
        architectures=("sm_90",),
        measured=(  # against the native kernel of that day; today's has not been timed
            Measurement("256 channels at 56 x 56, bfloat16, batch 256", "285 us, native 317", *_H200),
            Measurement("2048 channels at 7 x 7, bfloat16, batch 256", "41 us, native 46", *_H200),
        ),
    ),
    NATIVE,
    TRITON,
    REFERENCE,
)


class _AddReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, backend: str) -> Tensor:
        out = kernel("add_relu_fwd", backend)(x, residual)
        ctx.save_for_backward(out)
        ctx.backend = backend
        return out

    @staticmethod
    @on_a_backend
    def backward(ctx: Any, backend: str, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        grad = kernel_or(reference.relu_bwd, "add_relu_bwd", backend)(grad_out, *ctx.saved_tensors)
        return grad, grad, None


@tunable
def add_relu(x: Tensor, residual: Tensor, *, backend: str | None = None) -> Tensor:
    """relu(x + residual), the end of a residual block (arXiv 1512.03385, section 3.2, figure 2).

    Args:
        x: (N, C, H, W), floating point, any strides.
        residual: x's shape, dtype and device. Nothing is broadcast.
        backend: "reference", "native", "triton", or None for the best at hand.

    Returns:
        (N, C, H, W) in x's dtype; channels_last where x's channels are adjacent in memory, else contiguous.

    Saved for backward: the result, which the next layer keeps anyway. Nothing is mutated.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not agree.
        BackendUnavailable: an explicit backend cannot run here.
    """
    check_nchw("add_relu", "x", x)
    check_same("add_relu", "x", x, "residual", residual)
    backend = resolve("add_relu_fwd", backend, x, x.numel())
    if backend == "reference":
        return reference.add_relu(x, residual)
    if needs_grad(x, residual):
        return _AddReLU.apply(x, residual, backend)
    return kernel("add_relu_fwd", backend)(x, residual)
