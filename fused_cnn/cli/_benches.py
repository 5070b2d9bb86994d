"""What is timed, for `fused-cnn bench` and for `pytest benchmarks` alike: every op's real cases and whole
networks.

A Bench checks its numbers before it is timed; its variants (eager, the peers at hand, fused) do the same work
on the same tensors and are timed in interleaved rounds. Bytes are the least that the work can move and
operations are a direct convolution's, so GB/s and TFLOP/s say how near the device's limits a variant runs; a
form that needs fewer products (Winograd's), or a layer that stays in a CPU's cache, may pass them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import _backends, _library
from ..analysis import count, minimum_traffic, saved_bytes
from ..measure import Interleaved, Timing, Work
from ..ops._cases import Case, Maker, OpCases
from ..testing import all_cases, compare
from . import _memory, _networks, _peers
from ._ceilings import Ceilings
from ._numbers import LARGEST, Pair, compare_scores, compare_training, relative, scores, training_step

TRAINING_CHECK = (2, 96)  # images and pixels: float64 gradients in full size take minutes


@dataclass
class Prepared:
    """A piece of work, ready to be timed: its variants, the least bytes that it moves, its floating-point operations, and what
    was counted of it (launches, traffic, memory), for the row.
    """

    variants: dict[str, Work]
    bytes: int
    flops: int
    counted: dict[str, Any] = field(default_factory=dict)


@dataclass
class Bench:
    """One piece of work: what it is, how to check it, and its variants.

    `check` raises AssertionError where the fused variant's numbers are wrong. `make(compiled)` prepares the
    work, with torch.compile's variants or without, when it is timed and not before.
    """

    kind: str
    labels: dict[str, Any]
    check: Callable[[], None]
    make: Callable[[bool], Prepared]
    device: str
    compiled: bool = False

    @property
    def name(self) -> str:
        return "-".join(str(v) for v in self.labels.values()).replace(" ", "_")

    def row(self, timings: dict[str, Timing], work: Prepared, ceilings: Ceilings) -> dict[str, Any]:
        """The result as JSON. `limit` is in seconds."""
        eager = timings["eager"].median
        limit = ceilings.limit(work.bytes, work.flops, self.labels["dtype"])
        medians = {name: t.median for name, t in timings.items()}
        return {
            "kind": self.kind,
            **self.labels,
            "bytes": work.bytes,
            "flops": work.flops,
            "limit": limit,
            **work.counted,
            "times": {name: t.to_dict() for name, t in timings.items()},
            "ratios": {name: eager / t for name, t in medians.items() if name != "eager"},
            "gb_per_s": {name: work.bytes / t / 1e9 for name, t in medians.items()},
            "tflop_per_s": {name: work.flops / t / 1e12 for name, t in medians.items()},
            "share_of_limit": {name: limit / t for name, t in medians.items()},
        }

    def prepare(self) -> tuple[Prepared, Interleaved]:
        """Check, then make the work and its timer."""
        self.check()
        work = self.make(self.compiled)
        cold = self.kind == "op" and self.device == "cuda"  # a layer's tensors would stay in the second-level cache
        return work, Interleaved(work.variants, self.device, cold=cold)

    def run(self, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
        """Check, then time for so long; returns the row."""
        work, interleaved = self.prepare()
        return self.row(interleaved.run(seconds), work, ceilings)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def op_benches(
    dtypes: Sequence[torch.dtype],
    batches: Sequence[int],
    *,
    device: str,
    backend: str | None = None,
    compiled: bool = False,
    only: Sequence[str] = (),
) -> Iterator[Bench]:
    """Every op x real case x batch x dtype, forward and backward; channels_last."""
    for batch in batches:
        for op_cases in all_cases():
            if only and op_cases.name not in only:
                continue
            for case in (c.batched(batch) for c in op_cases.cases if c.real):
                for dtype in dtypes:
                    for direction in ("forward", "backward"):
                        yield _op_bench(op_cases, case, dtype, direction, device, backend, compiled)


def _by_name(op_cases: OpCases, device: str) -> list[str]:
    """The GPU's backends that implement the op here: each is a variant of its own there."""
    if device == "cpu":
        return []
    registered = op_cases.registered or f"{op_cases.name}_fwd"
    return [b for b in ("native", "triton") if _backends.status(b, device).on and _library.has_kernel(registered, b, device)]


def _op_bench(op_cases: OpCases, case: Case, dtype: torch.dtype, direction: str, device: str, backend: str | None, compiled: bool) -> Bench:
    backward = direction == "backward"
    named = _by_name(op_cases, device)

    def check() -> None:
        for chosen in (backend, *named):
            for comparison in compare(op_cases, case, chosen, dtype, device=device, backward=backward):
                assert comparison.ok, f"{op_cases.name}, {case.name}, {short(dtype)}, {chosen or 'auto'}: {comparison}"

    def variant(function: Callable[..., Tensor], **chosen: Any) -> Work:
        args, kwargs = op_cases.make(case, Maker(dtype, device=device, grad=backward))

        def forward() -> Tensor:
            return function(*args, **kwargs, **chosen)

        if not backward:
            return torch.no_grad()(forward)
        leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        result = forward()
        grad = torch.randn_like(result)
        return lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True)

    def make(compiled: bool) -> Prepared:
        cost = op_cases.cost(case, dtype.itemsize)
        variants = {"eager": variant(op_cases.op, backend="reference"), "fused": variant(op_cases.op, backend=backend)}
        variants |= {name: variant(op_cases.op, backend=name) for name in named}
        library = None if backward else _peers.library_call(op_cases.name, device)
        if library is not None:
            variants["library"] = variant(library)
            close = relative(variants["library"](), variants["eager"]())  # type: ignore[arg-type]
            assert close <= LARGEST[dtype], f"{op_cases.name}, {case.name}: the library's own call is {close:.1e} off"
        if compiled:
            torch._dynamo.reset()
            variants["compile"] = variant(torch.compile(op_cases.op), backend="reference")
        if backward:
            return Prepared(variants, cost.backward_bytes, cost.backward_flops)
        return Prepared(variants, cost.forward_bytes, cost.forward_flops)

    labels = {"op": op_cases.name, "case": case.name, "batch": case.shape[0], "dtype": short(dtype), "pass": direction}
    return Bench("op", labels, check, make, device, compiled)


def model_benches(
    names: Sequence[str],
    dtypes: Sequence[torch.dtype],
    batches: Sequence[int],
    *,
    device: str,
    passes: Sequence[str] = ("inference", "training step"),
    backend: str | None = None,
    compiled: bool = False,
    size: int = 224,
) -> Iterator[Bench]:
    """torchvision's networks with their BatchNorm statistics made real: inference at every batch, and a
    training step at the largest; a training step in a 16-bit dtype is float32 under autocast.
    """
    for name in names:
        for dtype in dtypes:
            for direction in passes:
                for batch in batches if direction == "inference" else [max(batches)]:
                    yield _model_bench(name, dtype, batch, direction, device, backend, compiled, size)


def _prepared(
    name: str, dtype: torch.dtype, batch: int, training: bool, device: str, backend: str | None, size: int
) -> tuple[Pair, Tensor]:
    """A network, eager and fused, and its images; to train, in float32 under autocast where the dtype has 16 bits."""
    every, images = (_networks.photographs(_networks.PHOTOGRAPHS, n, size).to(device) for n in (len(_networks.PHOTOGRAPHS), batch))
    network = _networks.network(name, every)
    if not training:
        return Pair.of(network.to(dtype), backend), images.to(dtype)
    pair = Pair.of(network, backend).training()
    if dtype != torch.float32:
        pair = Pair(_Autocast(pair.eager, dtype), _Autocast(pair.fused, dtype), pair.report)
    return pair, images


def _variant(variant: str, name: str, dtype: torch.dtype, batch: int, training: bool, *more: Any) -> Work:
    """One of a network's two variants by itself."""
    pair, images = _prepared(name, dtype, batch, training, *more)
    return _work(getattr(pair, variant), images, training)


class _Autocast(nn.Module):
    """A network under autocast (AMP), as people train in 16 bits."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Any:
        with torch.autocast(images.device.type, self.dtype):
            return self.model(images)


def _model_bench(
    name: str, dtype: torch.dtype, batch: int, direction: str, device: str, backend: str | None, compiled: bool, size: int
) -> Bench:
    training = direction != "inference"

    def check() -> None:
        few, pixels = TRAINING_CHECK
        pair, images = _prepared(name, dtype, few, training, device, backend, pixels if training else size)
        numbers = compare_training(pair, images, in_float64=False)[0] if training else [compare_scores(pair, images)[0]]
        wrong = [n for n in numbers if not n.ok]
        assert not wrong, f"{name}, {short(dtype)}, {direction}: {wrong[0]}"

    def make(compiled: bool) -> Prepared:
        pair, images = _prepared(name, dtype, batch, training, device, backend, size)
        variants = {"eager": _work(pair.eager, images, training), "fused": _work(pair.fused, images, training)}
        if not training:
            variants |= _peers.runtimes(pair.eager, images)
        if device == "cuda":
            variants |= {"graph": _peers.graphed(variants["eager"]), "fused graph": _peers.graphed(variants["fused"])}
        if compiled:
            # On a CPU only frozen weights have templates to choose from, and choosing takes minutes.
            modes = {"compile": None, "autotune": "max-autotune"} if device == "cuda" or not training else {"compile": None}
            made = _peers.compiled(pair.eager, lambda m: _work(m, images, training)(), *modes.values(), frozen=not training)
            variants |= {peer: _work(m, images, training) for peer, m in zip(modes, made, strict=True)}
        _agree(variants, LARGEST[dtype], f"{name}, {short(dtype)}, {direction}")
        plain = pair.eager.model if isinstance(pair.eager, _Autocast) else pair.eager
        least = minimum_traffic(copy.deepcopy(plain).to(dtype), images.to(dtype), backward=training).bytes
        counted, flops = _counted(pair, images, training)
        if device == "cuda":
            counted["peak"] = _memory.peaks_on_gpu(variants)
        else:
            job = (name, dtype, batch, training, device, backend, size)
            counted["peak"] = _memory.peaks_in_children({v: partial(_variant, v, *job) for v in ("eager", "fused")})
        return Prepared(variants, least, flops, counted)

    labels = {"model": name, "batch": batch, "dtype": short(dtype), "pass": direction}
    return Bench("model", labels, check, make, device, compiled)


def _work(model: nn.Module, images: Tensor, training: bool) -> Work:
    if training:
        return lambda: scores(training_step(model, images))
    return torch.no_grad()(lambda: model(images))


def _agree(variants: dict[str, Work], bound: float, what: str) -> None:
    """No peer is timed that computes something else."""
    eager = variants["eager"]()
    for name, work in variants.items():
        close = relative(work(), eager)  # type: ignore[arg-type]
        assert close <= bound, f"{what}: {name}'s scores are {close:.1e} off eager's, more than {bound:.1e}"


def _counted(pair: Pair, images: Tensor, training: bool) -> tuple[dict[str, Any], int]:
    """Launches, bytes moved, and for a training step bytes kept for its backward; operations of the eager network."""
    found: dict[str, Any] = {"launches": {}, "traffic": {}}
    flops = 0
    for variant, model in (("fused", pair.fused), ("eager", pair.eager)):
        counts = count(_work(model, images, training))
        found["launches"][variant], found["traffic"][variant], flops = counts.launches, counts.bytes, counts.flops
    if training:
        found["saved"] = {"eager": saved_bytes(pair.eager, images), "fused": saved_bytes(pair.fused, images)}
    return found, flops
