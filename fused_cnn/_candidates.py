"""What may run an op, and which of it does: every op has a list of candidates, and one rule picks.

A candidate is a backend of an op, or a tile of one of its kernels: data, with the predicate under which it may run, the
architectures that it is for, and the measurement that put it where it stands. Who asks for a backend by name gets it,
or BackendUnavailable. Otherwise the device's table decides (_tables.py: measured by `tune`, or shipped), and without an
entry the first candidate in order whose predicate holds and that can run here.

Tiles of the CUDA kernels follow the same rule where they are launched (csrc/cuda/gemm/tiles.h lists them; the table's
entries are handed to the library when it is read).
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _backends, _library, _tables
from ._backends import BackendUnavailable, architecture, status, usable
from ._tables import Key, Table
from ._trees import tensors

Choice = TypeVar("Choice")
Function = TypeVar("Function", bound=Callable[..., Any])


class Measurement(NamedTuple):
    """Why a candidate stands where it does: on what it was timed, the figures, and on which GPU and day."""

    shape: str
    figure: str
    gpu: str
    date: str


@dataclass(frozen=True)
class Candidate(Generic[Choice]):
    """A backend's name, or a kernel's tiles.

    `when` is called with what the op or the kernel says of its problem; `architectures` are "sm_90" and the like, all
    where there is none.
    """

    choice: Choice
    when: Callable[..., bool] | None = None
    architectures: tuple[str, ...] = ()
    measured: tuple[Measurement, ...] = ()

    def suits(self, problem: tuple[Any, ...]) -> bool:
        return self.when is None or self.when(*problem)


NATIVE, TRITON, REFERENCE = (Candidate(backend) for backend in ("native", "triton", "reference"))
IN_ORDER = (NATIVE, TRITON, REFERENCE)
_offered: dict[str, tuple[Candidate[str], ...]] = {}


def offer(op: str, *candidates: Candidate[str]) -> None:
    """State the candidates of a registered op, the best first; one that states none has IN_ORDER."""
    _offered[op] = candidates


_innermost: Callable[[], object] = getattr(
    getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None
)


def _in_functorch() -> bool:
    return _innermost() is not None


# As usable is: a trace enters the transforms that it goes through, and guards on those around it. It does not guard on
# the level of forward-mode derivatives, unless it reads it.
_in_functorch._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Quick answers of PyTorch's own. Without the first the longer way is gone; without the others such recordings of ops
# have no derivative.
_is_exporting = torch.compiler.is_exporting  # every op asks at every call
dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_PRE_DISPATCH = getattr(getattr(torch._C, "DispatchKey", None), "PreDispatch", None)
_key_included: Callable[[Any], bool] = getattr(
    torch._C, "_dispatch_tls_is_dispatch_key_included" if _PRE_DISPATCH is not None else "", lambda key: False
)


def records_early() -> bool:
    """Whether make_fx records calls before autograd sees them (pre_dispatch=True), which is no dispatch mode."""
    return _key_included(_PRE_DISPATCH)


def is_recording() -> bool:
    """Whether torch.export or make_fx records a graph that others will run and differentiate. In it an autograd
    function of ours would be the op that it calls, a node without a derivative: gradients would silently be lost."""
    return _is_exporting() or _key_included(_PRE_DISPATCH) or (dispatch_modes() > 0 and _is_proxied())


def _is_proxied() -> bool:
    """Whether make_fx records, and not AOTAutograd, which differentiates what it records at once: in its trace tensors
    are functional."""
    try:
        modes = torch._C._TorchDispatchModeKey
        of = torch._C._get_dispatch_mode
        return of(modes.PROXY) is not None and of(modes.FUNCTIONAL) is None
    except AttributeError:  # as if it were recorded: right, and slower under a mode of the user's
        return True


# As _in_functorch is. No guard is needed: what an export traces is not run in another trace's place.
is_recording._dynamo_marked_constant = True  # type: ignore[attr-defined]


def transforms_active() -> bool:
    """Whether a transform of torch.func or a forward-mode derivative is under way: they take an op apart by its rules,
    which kernels do not have, and without which derivatives would silently be zero."""
    return _in_functorch() or getattr(forward_ad, "_current_level", -1) >= 0


def refuse_transforms(what: str) -> None:
    """Raise BackendUnavailable for what has kernels alone, under a transform."""
    if transforms_active():
        raise BackendUnavailable(
            f"{what} cannot run under a transform of torch.func or a forward-mode derivative, for which kernels have "
            "no rules; use backend=None or 'reference' and plain weights there"
        )


def resolve(op: str, backend: str | None, x: Tensor, *problem: Any) -> str:
    """The backend that runs `op` (a registered name such as "add_relu_fwd") on x's device; under a transform
    (transforms_active) the reference, and in a graph that others will differentiate (is_recording), whatever was asked
    for.

    Raises ValueError for an unknown backend name and BackendUnavailable where an explicit one cannot run.
    """
    found = resolve_behind_graphs(op, backend, x, *problem)
    return found if found == "reference" or not is_recording() else "reference"


def resolve_behind_graphs(op: str, backend: str | None, x: Tensor, *problem: Any) -> str:
    """`resolve` for what is not recorded itself, but runs behind a node that has a derivative."""
    if backend is None or backend == "auto":
        return "reference" if transforms_active() else best(op, x.device, x.dtype, *problem)
    if backend not in _backends.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_backends.BACKENDS)} or None (auto), got {backend!r}")
    if backend == "reference":
        return backend
    refuse_transforms(f"backend {backend!r} of {op}")
    device_type = x.device.type
    if backend == "triton" and x.dtype == torch.float64:
        raise BackendUnavailable(
            f"backend 'triton' cannot run {op} in float64: its kernels compute in float32; use backend=None"
        )
    if not ready(backend, x.device):
        state = status(backend, x.device)
        raise BackendUnavailable(f"backend {backend!r} cannot run {op} on {device_type}: {state.reason}; {state.hint}")
    if not _library.has_kernel(op, backend, device_type):
        raise BackendUnavailable(f"backend {backend!r} has no kernel for {op} on {device_type}; use backend=None")
    return backend


def best(op: str, device: torch.device, dtype: torch.dtype, *problem: Any) -> str:
    """The first candidate that suits and can run here: what runs where nothing was measured."""
    for candidate in _offered.get(op, IN_ORDER):
        if _runs(op, candidate, device, dtype) and candidate.suits(problem):
            return candidate.choice
    return "reference"


def _runs(op: str, candidate: Candidate[str], device: torch.device, dtype: torch.dtype) -> bool:
    backend = candidate.choice
    if backend == "reference":
        return True
    if backend == "triton" and (device.type != "cuda" or dtype == torch.float64):  # its interpreter is for tests
        return False
    # What is ready may have been found to lack the kernel just then.
    if not ready(backend, device) or not _library.has_kernel(op, backend, device.type):
        return False
    return not candidate.architectures or architecture(device) in candidate.architectures


def ready(backend: str, device: torch.device) -> bool:
    """Whether a backend can run on a device. Before native kernels run on a GPU its table is read, which hands them
    their tiles, though nobody may ask it: a call with an explicit backend does not, nor does a compiled one."""
    if not usable(backend, device):
        return False
    if backend == "native" and device.type == "cuda":
        _tables.table(device)
    return True


ready._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as usable is


class _Measuring:
    """What `tune` is doing. Autograd's threads see it, too: backward passes have tiles of their own."""

    record: Callable[..., None] | None = None  # it listens to a model's calls
    table: Table | None = None  # it measures, and Triton's launchers measure their tiles into this
    seconds: Callable[[Mapping[Any, Callable[[], object]], torch.device], dict[Any, float]]


measuring = _Measuring()


def _layout(t: Tensor) -> str:
    if t.dim() != 4:
        return ""
    return "channels_last" if t.stride(1) == 1 else "contiguous" if t.is_contiguous() else "strided"


def _described(value: Any) -> Any:
    """What tells one call from another, without the values in its tensors: nested tuples of Python's literals."""
    if isinstance(value, Tensor):
        return (str(value.dtype)[6:], tuple(value.shape), _layout(value))
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    return value


def device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """Where a call runs, if tables are kept for it: not for tensors that only stand for others, as in a trace."""
    for value in (*args, *kwargs.values()):
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(first, Tensor):
            real = type(first) in (Tensor, nn.Parameter) and first.device.type in ("cpu", "cuda")
            return first.device if real else None
    return None


def _key(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], autocast: torch.dtype | None) -> Key:
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors((args, kwargs)))
    mode = ("training" if grad else "inference") + ("" if autocast is None else f" in {str(autocast)[6:]}")
    return (name, mode, _described(args), tuple(sorted((k, _described(v)) for k, v in kwargs.items())))


def _measured(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The backend that was measured to be fastest for this call; None where it was not measured."""
    device = device_of(args, kwargs)
    if device is None:
        return None
    choices = _tables.table(device).choices
    if not choices and measuring.record is None:
        return None
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    key = _key(function.__name__, args, kwargs, autocast)
    if measuring.record is None:
        entry = choices.get(key)
        return entry["best"] if entry else None
    measuring.record(function, key, autocast, args, kwargs)
    return None


def tunable(function: Function) -> Function:
    """A public op whose backend=None asks the table first; not in torch.compile's trace, which would have to guard on
    it, and not under a transform, where kernels do not run."""

    @functools.wraps(function)
    def call(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        if (
            backend is None
            and not torch.compiler.is_compiling()  # before the tables, for a trace guards on what it reads
            and (_tables.asks or measuring.record is not None)
            and not transforms_active()
        ):
            chosen = _measured(function, args, kwargs)
            if chosen is not None:
                with contextlib.suppress(BackendUnavailable):  # what was measured need not be built here
                    return function(*args, backend=chosen, **kwargs)
        return function(*args, backend=backend, **kwargs)

    return call  # type: ignore[return-value]


def pick(
    kernel: str,
    key: Key,
    candidates: Sequence[Candidate[Choice]],
    launch: Callable[[Choice], None],
    device: torch.device,
    problem: tuple[Any, ...] = (),
) -> Choice:
    """The tiles to launch a Triton kernel with: the table's, where they are still a candidate, else the first that suit
    the problem, or the last. While `tune` measures, every candidate is launched, on tune's own tensors, and the fastest
    is kept."""
    default = next((c for c in candidates if c.suits(problem)), candidates[-1]).choice
    if len(candidates) == 1:
        return default
    key = (kernel, *key)
    entries = _tables.table(device).tiles if measuring.table is None else measuring.table.tiles
    if measuring.table is not None and key not in entries:
        timed = measuring.seconds({c.choice: functools.partial(launch, c.choice) for c in candidates}, device)
        seconds = {str(tuple(tiles)): s for tiles, s in timed.items()}
        entries[key] = {"best": list(min(timed, key=timed.__getitem__)), "seconds": seconds}
    found = entries[key]["best"] if key in entries else None
    return next((c.choice for c in candidates if list(c.choice) == found), default)  # type: ignore[call-overload]
