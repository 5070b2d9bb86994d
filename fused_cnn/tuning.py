"""Which candidate is fastest for an op and a shape: measured on request, remembered, and asked by backend=None.

Two kinds of answer, in one table per device. `choices`: the backend of a public op's call, the library's path among the candidates, for
inference or with the backward pass. `tiles`: the configuration of a Triton kernel for one problem size. `tune` measures both on
tensors of its own, never on the caller's; nothing else measures. Without an entry the heuristics decide, so that no first call stalls.

A table is JSON. The measured one lies in the cache folder (FUSED_CNN_CACHE_DIR, or ~/.cache/fused_cnn), in a file of its own for each
device, driver, torch, Triton and state of the kernels' sources: what was measured elsewhere, or before a change, is never found. Tables
that ship with the package (fused_cnn/tables/) hold for a device and the sources.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import _library
from ._backends import BACKENDS, BackendUnavailable
from .measure import Interleaved

VERSION = 1
PACKAGE = Path(__file__).parent
Key = tuple[Any, ...]
T = TypeVar("T", bound=Callable[..., Any])
Tiles = TypeVar("Tiles", bound=NamedTuple)


@dataclass
class Table:
    """What was measured on one device: entries by key, each with the winner and every candidate's seconds."""

    choices: dict[Key, dict[str, Any]] = field(default_factory=dict)
    tiles: dict[Key, dict[str, Any]] = field(default_factory=dict)

    def update(self, other: Table) -> None:
        self.choices |= other.choices
        self.tiles |= other.tiles

    def to_json(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        kinds = {"choices": self.choices, "tiles": self.tiles}
        return {"version": VERSION, **facts, **{name: {repr(k): v for k, v in in_order(kind)} for name, kind in kinds.items()}}

    @classmethod
    def from_json(cls, document: Mapping[str, Any], wanted: Mapping[str, Any]) -> Table:
        """Raises ValueError where the document is no table, or one of another device or of other sources."""
        for name, value in {"version": VERSION, **wanted}.items():
            if document.get(name) != value:
                raise ValueError(f"its {name} is {document.get(name)!r}, not {value!r}")
        table = cls(*({ast.literal_eval(k): v for k, v in document[kind].items()} for kind in ("choices", "tiles")))
        for entry in table.choices.values():
            if entry["best"] not in BACKENDS:
                raise ValueError(f"it names a backend {entry['best']!r}")
        for entry in table.tiles.values():
            if not all(isinstance(n, int) for n in entry["best"]):
                raise ValueError(f"it has tiles {entry['best']!r}")
        return table


def in_order(entries: Mapping[Key, Any]) -> list[tuple[Key, Any]]:
    """The entries in an order that does not depend on when they were measured."""
    return sorted(entries.items(), key=lambda item: repr(item[0]))


@functools.lru_cache
def source_hash() -> str:
    """A hash of every kernel's source: of the Triton files as they are, of csrc/ as it was when the libraries were built."""
    digest = hashlib.sha256()
    for path in sorted((PACKAGE / "ops").rglob("*triton*.py")):
        digest.update(path.read_bytes())
    if _library.cpu_module is not None:
        digest.update(_library.cpu_module.build_info["sources"].encode())
    return digest.hexdigest()[:16]


@functools.lru_cache
def device_name(device_type: str) -> str:
    """The device as tables name it: the first GPU's, or the processor's with its instruction set and threads."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    model = re.search(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    level = _library.cpu_module.build_info["cpu_level"] if _library.cpu_module else "no native kernels"
    return f"{model[1] if model else 'CPU'}, {level}, {torch.get_num_threads()} threads"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def driver(device_type: str) -> int | None:
    """CUDA's driver version, such as 13000; None on a CPU."""
    if device_type != "cuda":
        return None
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


@functools.lru_cache
def facts(device_type: str) -> dict[str, Any]:
    """What a measured table holds for."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    name = device_name(device_type)
    return {"device": name, "driver": driver(device_type), "torch": torch.__version__, "triton": triton, "sources": source_hash()}


def cache_dir() -> Path:
    """Where measured tables lie; made by the first one."""
    return Path(os.environ.get("FUSED_CNN_CACHE_DIR") or Path.home() / ".cache" / "fused_cnn")


def cache_file(device_type: str) -> Path:
    """The measured table of this device, driver, torch, Triton and sources."""
    found = facts(device_type)
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]
    slug = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    return cache_dir() / f"{slug}-{digest}.json"


def load(path: Path, wanted: Mapping[str, Any]) -> Table:
    """The table in a file; an empty one, with a warning, where the file cannot be used. A missing file is no fault."""
    try:
        return Table.from_json(json.loads(path.read_text()), wanted)
    except FileNotFoundError:
        return Table()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"fused_cnn ignores the tuning table {path} ({reason}); `fused-cnn tune` makes it anew", stacklevel=2)
        return Table()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. The system drops the lock of a process that ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def save(path: Path, table: Table, found: Mapping[str, Any]) -> None:
    """Add the table's entries to those of the file, which is at every moment the old one or the new one, whole."""
    with _locked(path):
        merged = load(path, found)
        merged.update(table)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with open(handle, "w") as file:
                json.dump(merged.to_json(found), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


class _Call(NamedTuple):
    """A public op's call, with its tensors described, not kept."""

    function: Callable[..., Any]
    key: Key
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def first_shape(key: Key) -> str:
    """The first activation of a choice's key, to be shown."""
    described = key[2][0] if key[2] else key[3][0][1]
    dtype, shape, layout = described if isinstance(described[0], str) else described[0]
    return f"{'x'.join(map(str, shape))} {dtype} {layout}"


class _State:
    """What tune is doing. Autograd's threads see it, too: backward passes have tiles of their own."""

    calls: dict[Key, _Call] | None = None  # it listens to a model
    measured: Table | None = None  # it measures, and Triton's launchers measure their tiles
    asks = True  # whether an op need look at the tables at all: a microsecond, where an op may take five


_state = _State()


_lock = threading.Lock()
_tables: dict[str, Table] = {}  # by device type; loaded at the device's first call


def table(device_type: str) -> Table:
    """What is known of the device: the shipped tables' entries, and over them the measured ones."""
    with _lock:
        if device_type not in _tables:
            found = Table()
            if device_type == "cuda" or cache_file(device_type).exists():
                wanted = {name: facts(device_type)[name] for name in ("device", "sources")}
                for path in sorted((PACKAGE / "tables").glob("*.json")):
                    if json.loads(path.read_text())["device"] == wanted["device"]:
                        found.update(load(path, wanted))
                found.update(load(cache_file(device_type), facts(device_type)))
            _tables[device_type] = found
            devices = ("cpu", "cuda") if torch.backends.cuda.is_built() else ("cpu",)
            _state.asks = any(d not in _tables or _tables[d].choices for d in devices)
        return _tables[device_type]


def forget() -> None:
    """Read the tables again at the next call."""
    with _lock:
        _tables.clear()
        _state.asks = True


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


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]


def _key(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key:
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(args, kwargs))
    return (name, "training" if grad else "inference", _described(args), tuple(sorted((k, _described(v)) for k, v in kwargs.items())))


def _choice(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The backend that was measured to be fastest for this call; None where it was not measured."""
    if torch.compiler.is_compiling():  # tables are read and keys are made outside of a trace
        return None
    if _state.calls is None:
        first = args[0] if args else next(iter(kwargs.values()))
        first = first[0] if isinstance(first, (list, tuple)) else first
        choices = table(first.device.type).choices
        entry = choices.get(_key(function.__name__, args, kwargs)) if choices else None
        return entry["best"] if entry else None
    if all(t.dtype != torch.uint8 for t in _tensors(args, kwargs)):  # packed weights have their backend already
        key = _key(function.__name__, args, kwargs)
        _state.calls.setdefault(key, _Call(function, key, *pytree.tree_map_only(Tensor, _Spec.of, (args, kwargs))))
    return None


def tunable(function: T) -> T:
    """A public op whose backend=None asks the tables before the heuristics."""

    @functools.wraps(function)
    def call(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        if backend is None and (_state.asks or _state.calls is not None):
            backend = _choice(function, args, kwargs)
        return function(*args, backend=backend, **kwargs)

    return call  # type: ignore[return-value]


def pick(kernel: str, problem: Key, candidates: Sequence[Tiles], default: Tiles, launch: Callable[[Tiles], None], device: str) -> Tiles:
    """The tiles to launch a Triton kernel with: the table's, where they are still a candidate, or the default. While `tune` measures,
    every candidate is launched, on tune's own tensors, and the fastest is kept."""
    key = (kernel, *problem)
    if _state.measured is None:
        entry = table(device).tiles.get(key)
        return next((tiles for tiles in candidates if entry and list(tiles) == entry["best"]), default)
    if key not in _state.measured.tiles:
        timed = _seconds({str(i): functools.partial(launch, tiles) for i, tiles in enumerate(candidates)}, device)
        best = min(timed, key=timed.__getitem__)
        seconds = {str(tuple(candidates[int(i)])): s for i, s in timed.items()}
        _state.measured.tiles[key] = {"best": list(candidates[int(best)]), "seconds": seconds}
    best_tiles = _state.measured.tiles[key]["best"]
    return next(tiles for tiles in candidates if list(tiles) == best_tiles)


def _seconds(variants: Mapping[str, Callable[[], object]], device: str) -> dict[str, float]:
    timings = Interleaved(variants, device, cold=True).run(0.02, at_least=7)
    return {name: t.median for name, t in timings.items()}


class _Spec(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, t: Tensor) -> _Spec:
        return cls(tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad)

    def make(self) -> Tensor:
        """A tensor of random values; vectors are positive, because variances are."""
        t = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        if t.is_floating_point():
            t = t.uniform_(0.5, 1.5) if t.dim() < 2 else t.normal_()
        return t.requires_grad_(self.requires_grad)


def _work(call: _Call, backend: str) -> Callable[[], object]:
    is_spec = lambda value: isinstance(value, _Spec)  # noqa: E731
    args, kwargs = pytree.tree_map(lambda v: v.make() if is_spec(v) else v, (call.args, call.kwargs), is_leaf=is_spec)
    if call.key[1] == "inference":
        return torch.no_grad()(lambda: call.function(*args, **kwargs, backend=backend))
    leaves = [t for t in _tensors(args, kwargs) if t.requires_grad]

    def step() -> object:
        out = call.function(*args, **kwargs, backend=backend)
        return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return torch.enable_grad()(step)


def _measure(call: _Call, backends: Sequence[str], device: str) -> None:
    assert _state.measured is not None
    variants = {}
    for backend in backends:
        work = _work(call, backend)
        try:
            work()  # compiles; Triton's launchers measure their tiles here
        except BackendUnavailable:
            continue
        variants[backend] = work
    timed = _seconds(variants, device)
    _state.measured.choices[call.key] = {"best": min(timed, key=timed.__getitem__), "seconds": timed}


def _calls_of(model: Callable[..., Any], example: Sequence[Tensor], train: bool) -> list[_Call]:
    """Every different call of a public op that the model makes; its buffers, such as running statistics, are left as they were."""
    buffers = {b: b.clone() for b in model.buffers()} if isinstance(model, nn.Module) else {}
    _state.calls = {}
    try:
        with torch.set_grad_enabled(train):
            model(*example)
        return list(_state.calls.values())
    finally:
        _state.calls = None
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


def tune(
    model: Callable[..., Any],
    *example: Tensor,
    train: bool = False,
    backends: Sequence[str] = BACKENDS,
    say: Callable[[str], None] = lambda text: None,
) -> Table:
    """Measure every candidate for each op that `model` calls on `example`, and remember the fastest in the cache folder.

    Args:
        model: a fused module, or any callable over the ops of fused_cnn; it is run once, with gradients if `train`, else without.
        example: its arguments; their shapes, dtypes and device are what is tuned for.
        train: measure forward and backward, not forward alone.
        backends: the candidates; the library's path ("reference") must be among them.
        say: told of each step, for a progress display.

    While it runs no other thread may call the ops.

    Returns:
        What was measured now. Later calls with backend=None use it, in this process at once and in others from their start.

    Raises:
        ValueError: "reference" is not a candidate, or the model calls no op with backend=None.
    """
    if "reference" not in backends:
        raise ValueError(f"tune: the library's path, 'reference', must be among the candidates, got {', '.join(backends)}")
    device = example[0].device.type
    calls = _calls_of(model, example, train)
    if not calls:
        raise ValueError("tune: the model calls no fused op with backend=None on unpacked weights; is it fused?")
    _state.measured = Table()
    try:
        for i, call in enumerate(calls, 1):
            say(f"{i} of {len(calls)}: {call.key[0]}, {call.key[1]}")
            _measure(call, backends, device)
        measured = _state.measured
    finally:
        _state.measured = None
    save(cache_file(device), measured, facts(device))
    forget()
    return measured
