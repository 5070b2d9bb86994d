"""How a call comes in: whether it is traced, whether a mode of the user's watches it, of what kind its input is, and
whether that is large enough."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._candidates import dispatch_modes, records_early, transforms_active
from .._layout import asks_for_channels_last, result_format
from ..ops._conv import autocast_dtype
from .cache import Kind
from .fold import Pair, stands_for_another

with contextlib.suppress(ImportError):
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# Elements of an input from which fusion gains a block more than its calls from Python cost, measured on two cores.
PAYS_FROM = 600_000
_PLAIN, _STRIDED = (Tensor, nn.Parameter), torch.strided
# PyTorch's modes under which blocks run fused: they know this package's ops, or change nothing that is computed. Others
# say so of themselves, by an attribute `sees_fused_ops`.
_KNOWN_MODES = ("torch.utils.flop_counter", "torch.utils._device")
# Quick answers of PyTorch's own; without them the longer way is gone.
_any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_jit_traces: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)


def kind_of(x: Tensor) -> Kind | None:
    """What folded weights depend on in an input; None for inputs and moments that the fused ops are not for, as a trace
    of torch.jit's, whose graphs hold PyTorch's operators alone."""
    if type(x) not in _PLAIN or x.dim() != 4 or x.layout is not _STRIDED or transforms_active() or _jit_traces():
        return None
    if not (x.is_cpu or x.is_cuda) or ((dispatch_modes() or _function_modes()) and is_under_mode()):
        return None
    return (autocast_dtype(x) if _any_autocast() else None, x.dtype, x.device)


def pays_on_cpu(x: Tensor, pairs: Sequence[Pair], *, in_nchw: bool) -> bool:
    """Whether a block gains by a fused run with batch statistics or gradients; `in_nchw` says so of contiguous memory,
    of which the kernels make channels_last first."""
    if x.numel() < PAYS_FROM:
        return False
    is_fast = result_format(x) is torch.channels_last or any(asks_for_channels_last(c.weight) for c, _ in pairs)
    return in_nchw or is_fast


def is_under_mode() -> bool:
    """Whether a mode of the user's wants to see PyTorch's own operators, or may change what they do."""
    try:
        modes = [*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()]
    except NameError:
        return True
    return not all(type(m).__module__ in _KNOWN_MODES or getattr(m, "sees_fused_ops", False) for m in modes)


def is_traced(x: Any) -> bool:
    """Whether a call is recorded, or computes shapes alone, so that nothing of it may be kept."""
    if torch.compiler.is_compiling():
        return True
    if type(x) in _PLAIN and not dispatch_modes():
        return records_early()
    if stands_for_another(x):
        return True
    try:
        modes = torch._C._TorchDispatchModeKey
        return any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY))
    except AttributeError:  # as if it were recorded: right, and slower under a mode of the user's
        return True
