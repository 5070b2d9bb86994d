"""Measures which candidate is fastest for an op and a shape (_candidates.py), and remembers it (_tables.py).

The candidates of a public op's call are the backends, PyTorch's own operators among them, for inference or with the
backward pass; those of a kernel are its tiles. `tune` measures them on tensors of its own, never on the caller's;
nothing else measures, so that no first call stalls.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _library, _tables
from ._backends import BACKENDS
from ._candidates import measuring
from ._tables import Key, Table
from ._trees import leaves_of, mapped, tensors
from .measure import graphed, interleaved
from .ops import inception, pack_inception


class _Call(NamedTuple):
    """A public op's call, with tensors on the meta device in place of its own."""

    function: Callable[..., Any]
    key: Key
    autocast: torch.dtype | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _seconds(variants: Mapping[Any, Callable[[], object]], device: torch.device) -> dict[Any, float]:
    """Median seconds of each that runs; what does not, for want of shared memory or of a kernel, is no candidate."""
    runs: dict[Any, Callable[[], object]] = {}
    error: Exception | None = None
    for name, work in variants.items():
        try:
            work()  # compiles; inside of an op, Triton's launchers measure their tiles here
            runs[name] = work
        except Exception as failed:
            error = failed
    if not runs:
        raise RuntimeError("tune: no candidate runs") from error
    return {name: t.median for name, t in interleaved(runs, device, 0.02, at_least=7, cold=True).items()}


def _without_values(t: Tensor) -> Tensor:
    like = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    return like.requires_grad_(t.requires_grad)


def _random(like: Tensor, device: torch.device) -> Tensor:
    """A tensor of random values; vectors are positive, because variances are."""
    sizes = [min(n, 1) if step == 0 else n for n, step in zip(like.shape, like.stride(), strict=True)]
    t = torch.empty_strided(sizes, like.stride(), dtype=like.dtype, device=device)
    if t.is_floating_point():
        t = t.uniform_(0.5, 1.5) if t.dim() < 2 else t.normal_()
    return t.expand(like.shape).requires_grad_(like.requires_grad)


def _work(call: _Call, backend: str, device: torch.device) -> Callable[[], object]:
    args, kwargs = mapped(functools.partial(_random, device=device), (call.args, call.kwargs), Tensor)
    leaves = leaves_of((args, kwargs))

    def step() -> object:
        enabled = call.autocast is not None
        with (
            torch.set_grad_enabled(bool(leaves)),
            torch.autocast(device.type, call.autocast, enabled=enabled, cache_enabled=False),
        ):
            out = call.function(*args, **kwargs, backend=backend)
        return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True) if leaves else out

    return step


def _measure(call: _Call, backends: Sequence[str], device: torch.device) -> None:
    assert measuring.table is not None
    works = {backend: _work(call, backend, device) for backend in backends}
    works["reference"]()  # where PyTorch's own path fails, the call itself is at fault
    if "native" in works and device.type == "cuda" and _library.cuda.loaded is not None:
        with contextlib.suppress(Exception):  # what does not run is no candidate, which _seconds finds, too
            measure_tiles(works["native"], device, _library.cuda.loaded, measuring.table)
    timed = _seconds(works, device)
    measuring.table.choices[call.key] = {"best": min(timed, key=timed.__getitem__), "seconds": timed}


def measure_tiles(work: Callable[[], object], device: torch.device, library: ctypes.CDLL, table: Table) -> None:
    """Time `work` with each tile of each problem that it has, keep the fastest, and leave it chosen; of a whole block's
    problem see `measure_block`."""
    for problem in _library.problems_of(library, work):
        key = (_tables.GEMM, *problem[1:])
        if key in table.tiles or problem[-1] == _library.BLOCK:
            continue

        def with_tile(tile: _library.Tile, problem: _library.Problem = problem) -> object:
            _library.choose_tile(library, problem, tile)
            return work()

        best = None  # of what is interrupted
        try:
            tiles = _library.tiles_of(library, problem)
            timed = _seconds({tile: functools.partial(with_tile, tile) for tile in tiles}, device)
            best = min(timed, key=timed.__getitem__)
        finally:
            _library.choose_tile(library, problem, best)
        table.tiles[key] = {"best": list(best), "seconds": {str(tile): s for tile, s in timed.items()}}


def measure_block(work: Callable[[], Tensor], device: torch.device, library: ctypes.CDLL, table: Table) -> None:
    """Time each way to run a whole block, keep the fastest, and leave it chosen. They differ in CUDA graphs alone, and
    must give the same there, for their kernels are the same.

    Raises:
        RuntimeError: they do not, or a capture failed, behind which this process can make no other.
    """
    for problem in _library.problems_of(library, work):
        key = (_tables.GEMM, *problem[1:])
        if key in table.tiles or problem[-1] != _library.BLOCK:
            continue
        best, replays = None, dict[_library.Tile, Callable[[], Any]]()
        try:
            for tile in _library.tiles_of(library, problem):
                _library.choose_tile(library, problem, tile)
                replays[tile] = graphed(work, device)
            timed = _seconds(replays, device)
            first, *others = [replay() for replay in replays.values()]  # behind many that hid no race
            if not all(torch.equal(first, other) for other in others):
                raise RuntimeError(
                    f"tune: the ways to run the block {problem} give different results; please report it"
                )
            best = min(timed, key=timed.__getitem__)
        finally:
            _library.choose_tile(library, problem, best)
        table.tiles[key] = {"best": list(best), "seconds": {str(tile): s for tile, s in timed.items()}}


def _packed_block(call: _Call, device: torch.device) -> Callable[[], Tensor]:
    """An Inception block's call with its weights as a network in eval has them."""
    x, weights, biases = mapped(lambda t: _random(t, device).detach(), call.args, Tensor)
    x = x.to(call.autocast or x.dtype)
    packed = pack_inception(weights, biases, like=x, backend="native")
    return torch.no_grad()(lambda: inception(x, *packed))


def _calls_of(model: Callable[..., Any], example: Sequence[Tensor], train: bool) -> list[_Call]:
    """Every different call of a public op that the model makes; its buffers, such as running statistics, are left as
    they were."""
    buffers = {b: b.clone() for b in model.buffers()} if isinstance(model, nn.Module) else {}
    calls: dict[Key, _Call] = {}

    def record(function: Callable[..., Any], key: Key, autocast: torch.dtype | None, *arguments: Any) -> None:
        if all(t.dtype != torch.uint8 for t in tensors(arguments)):  # packed weights have their backend already
            calls.setdefault(key, _Call(function, key, autocast, *mapped(_without_values, arguments, Tensor)))

    measuring.record = record
    try:
        with torch.set_grad_enabled(train):
            model(*example)
        return list(calls.values())
    finally:
        measuring.record = None
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
    """Measure every candidate for each op that `model` calls on `example`, and remember the fastest in the cache
    folder.

    Args:
        model: a fused module, or any callable over the ops of fused_cnn; it is run once, with gradients if `train`,
            else without. A module's buffers are left as they were; what a plain callable changes stays changed.
        example: its arguments; their shapes, dtypes and device are what is tuned for.
        train: measure forward and backward, not forward alone.
        backends: the candidates; PyTorch's own path ("reference") must be among them.
        say: told of each step, for a progress display.

    While it runs no other thread may call the ops.

    Returns:
        What was measured now. Later calls with backend=None use it, in this process at once and in others from their
        start; folded blocks on a GPU, which are native, use its tiles, PyTorch's own convolution among them.

    Raises:
        ValueError: "reference" is not a candidate, or the model calls no op with backend=None.
        OSError: the cache folder cannot be written.
        RuntimeError: the ways to run an Inception block in a CUDA graph give different results, or cannot be captured;
            what was measured before is kept.
    """
    if "reference" not in backends:
        raise ValueError(
            f"tune: PyTorch's own path, 'reference', must be among the candidates, got {', '.join(backends)}"
        )
    device = example[0].device
    calls = _calls_of(model, example, train)
    if not calls:
        raise ValueError(
            "tune: the model calls no fused op with backend=None on unpacked weights; is it fused, and not compiled?"
        )
    path, found = _tables.cache_file(device), _tables.facts(device)
    _tables.save(path, Table(), found)  # a folder that cannot be written is an error now, not after the measuring
    measured = measuring.table = Table()
    measuring.seconds = lambda variants, device: _seconds(variants, device)
    try:
        for i, call in enumerate(calls, 1):
            say(f"{i} of {len(calls)}: {call.key[0]}, {call.key[1]}")
            _measure(call, backends, device)
        library = _library.cuda.loaded
        if library is not None and device.type == "cuda" and "native" in backends and not train:
            for call in calls:  # behind all others: a capture that fails is the process's last
                if call.key[0] == "inception":
                    measure_block(_packed_block(call, device), device, library, measured)
    finally:  # interrupted, it keeps what it has
        measuring.table = None
        _tables.save(path, measured, found)
        _tables.forget()
    return measured
