"""When an op runs as an autograd.Function, and what every such function's backward is wrapped in."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_TWICE = (
    "fused_cnn's kernels are differentiable once; for second derivatives (create_graph=True) call the op or fuse the "
    "model with backend='reference'"
)


class _RefuseAgain(torch.autograd.Function):
    """Gradients that have a history, whose derivative is refused."""

    @staticmethod
    def forward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(_TWICE)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a backward in its forward's dtypes, whatever autocast is on around it, and makes a second one raise.

    A forward's tensors have been cast once. Where `loss.backward()` is called under an autocast that the forward was
    not, that autocast would reach into the kernels, whose convolutions of float32 would come back in 16 bits.

    torch.autograd.function.once_differentiable raises only where grad_out has a history. The gradients depend on what
    forward saved too, and a penalty on them would silently have no gradient.
    """

    @wraps(backward)
    def in_the_forwards_dtypes(ctx: Any, grad_out: Tensor) -> Any:
        device = grad_out.device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, grad_out)
        with torch.autocast(device, enabled=False):
            return backward(ctx, grad_out)

    @wraps(backward)
    def once(ctx: Any, grad_out: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return in_the_forwards_dtypes(ctx, grad_out)
        with torch.no_grad():
            grads = in_the_forwards_dtypes(ctx, grad_out)
        return _RefuseAgain.apply(*(None if grad is None else grad.detach().requires_grad_() for grad in grads))

    return once


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
