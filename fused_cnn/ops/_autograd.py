"""When an op runs as an autograd.Function, and what runs such a function's backward."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .._candidates import transforms_active
from .._library import kernel

_is_batched: Callable[[Tensor], bool] = getattr(
    getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", lambda t: False
)


def _taken_apart(grad_out: Tensor) -> bool:
    """Whether gradients need a history, as they are differentiated again (create_graph=True), or rules for vmap, as
    they come many at a time (is_grads_batched=True, which is not one of torch.func's transforms). Kernels have neither.
    In a trace there is no batch."""
    if torch.is_grad_enabled() or transforms_active():
        return True
    return not torch.compiler.is_compiling() and _is_batched(grad_out)


def on_a_backend(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Hands a backward its forward's backend, or "reference" where its operations are taken apart; and runs it in its
    forward's dtypes, whatever autocast is on around it.

    On the reference a backward is made of PyTorch's own operations. It starts from what forward saved, which are inputs
    and the result of its function and so lead back to all that they depend on.

    A forward's tensors have been cast once. Where `loss.backward()` is called under an autocast that the forward was
    not, that autocast would reach into the kernels, whose convolutions of float32 would come back in 16 bits.
    """

    @wraps(backward)
    def call(ctx: Any, grad_out: Tensor) -> Any:
        backend = "reference" if _taken_apart(grad_out) else ctx.backend
        device = grad_out.device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, backend, grad_out)
        with torch.autocast(device, enabled=False):
            return backward(ctx, backend, grad_out)

    return call


def kernel_or(formula: Callable[..., Any], name: str, backend: str) -> Callable[..., Any]:
    """The backend's kernel; on the reference its formula, which takes the same arguments."""
    return formula if backend == "reference" else kernel(name, backend)


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
