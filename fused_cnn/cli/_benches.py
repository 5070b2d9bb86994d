"""What is timed, for `fused-cnn bench` and for `pytest benchmarks` alike: every op's real cases and whole
networks.

A Bench checks its numbers before it is timed; its variants (eager, the peers at hand, fused) do the same work
on the same tensors and are timed in interleaved rounds. Bytes are the least that the work can move and
operations are a direct convolution's, so GB/s and TFLOP/s say how near the device's limits a variant runs; a
form that needs fewer products (Winograd's), or a layer that stays in a CPU's cache, may pass them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ._numbers import LARGEST, Autocast, Pair, compare_scores, compare_training, relative, scores, training_step

COMPILERS = {"compile": None, "autotune": "max-autotune"}  # torch.compile's modes
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

    def add_peers(self, makers: Mapping[str, Callable[[], Work]], bound: float) -> None:
        """Add the peers that can be made and whose result is eager's within `bound`; of the others the row says why they are not there."""
        eager = self.variants["eager"]()
        for name, make in makers.items():
            try:
                work = make()
                off = relative(work(), eager)  # type: ignore[arg-type]
                if not off <= bound:
                    raise AssertionError(f"its result is {off:.1e} off eager's, more than {bound:.1e}")
                self.variants[name] = work
            except Exception as error:  # whatever a peer raises, ours are still timed
                self.counted.setdefault("absent", {})[name] = described(error)


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


@dataclass
class Bench:
    """One piece of work: what it is, how to check it, and its variants.

    `check` raises AssertionError where the fused variant's numbers are wrong. `make(compilers)` prepares the
    work, with these of COMPILERS among its variants, when it is timed and not before.
    """

    kind: str
    labels: dict[str, Any]
    check: Callable[[], None]
    make: Callable[[Sequence[str]], Prepared]
    device: str
    compilers: Sequence[str] = ()

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
        if self.compilers:
            torch._dynamo.reset()  # forgets the row before; within a row nothing may be forgotten
        work = self.make(self.compilers)
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
    compilers: Sequence[str] = (),
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
                        yield _op_bench(op_cases, case, dtype, direction, device, backend, compilers)


def _by_name(op_cases: OpCases, device: str) -> list[str]:
    """The GPU's backends that implement the op here: each is a variant of its own there."""
    if device == "cpu":
        return []
    return [b for b in ("native", "triton") if _backends.status(b, device).on and _library.has_kernel(op_cases.decides, b, device)]


def _op_bench(
    op_cases: OpCases, case: Case, dtype: torch.dtype, direction: str, device: str, backend: str | None, compilers: Sequence[str]
) -> Bench:
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

    def make(compilers: Sequence[str]) -> Prepared:
        cost = op_cases.cost(case, dtype.itemsize)
        variants = {"eager": variant(op_cases.op, backend="reference"), "fused": variant(op_cases.op, backend=backend)}
        variants |= {name: variant(op_cases.op, backend=name) for name in named}
        counts = (cost.backward_bytes, cost.backward_flops) if backward else (cost.forward_bytes, cost.forward_flops)
        work = Prepared(variants, *counts)
        library = _peers.library_call(op_cases.name, device)
        if library is not None and not backward:
            work.add_peers({"library": lambda: variant(library)}, LARGEST[dtype])
        for name in compilers:
            variants[name] = variant(torch.compile(op_cases.op, mode=COMPILERS[name]), backend="reference")
        return work

    labels = {"op": op_cases.name, "case": case.name, "batch": case.shape[0], "dtype": short(dtype), "pass": direction}
    return Bench("op", labels, check, make, device, compilers)


def model_benches(
    names: Sequence[str],
    dtypes: Sequence[torch.dtype],
    batches: Sequence[int],
    *,
    device: str,
    passes: Sequence[str] = ("inference", "training step"),
    backend: str | None = None,
    compilers: Sequence[str] = (),
    size: int = 224,
) -> Iterator[Bench]:
    """torchvision's networks with their BatchNorm statistics made real: inference at every batch, and a
    training step at the largest; a training step in a 16-bit dtype is float32 under autocast.
    """
    for direction in passes:
        for dtype in dtypes:
            for batch in batches if direction == "inference" else [max(batches)]:
                for name in names:
                    yield _model_bench(name, dtype, batch, direction, device, backend, compilers, size)


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
        pair = Pair(Autocast(pair.eager, dtype), Autocast(pair.fused, dtype), pair.report)
    return pair, images


def _variant(variant: str, name: str, dtype: torch.dtype, batch: int, training: bool, *more: Any) -> Work:
    """One of a network's two variants by itself."""
    pair, images = _prepared(name, dtype, batch, training, *more)
    return _work(getattr(pair, variant), images, training)


def _model_bench(
    name: str, dtype: torch.dtype, batch: int, direction: str, device: str, backend: str | None, compilers: Sequence[str], size: int
) -> Bench:
    training = direction != "inference"

    def check() -> None:
        few, pixels = TRAINING_CHECK
        pair, images = _prepared(name, dtype, few, training, device, backend, pixels if training else size)
        numbers = compare_training(pair, images, in_float64=False)[0] if training else [compare_scores(pair, images)[0]]
        wrong = [n for n in numbers if not n.ok]
        assert not wrong, f"{name}, {short(dtype)}, {direction}: {wrong[0]}"

    def make(compilers: Sequence[str]) -> Prepared:
        pair, images = _prepared(name, dtype, batch, training, device, backend, size)
        models = {"eager": pair.eager, "fused": pair.fused}
        variants = {variant: _work(model, images, training) for variant, model in models.items()}
        plain = pair.eager.model if isinstance(pair.eager, Autocast) else pair.eager
        least = minimum_traffic(copy.deepcopy(plain).to(dtype), images.to(dtype), backward=training).bytes
        counted, flops = _counted(models, images, training)
        work = Prepared(variants, least, flops, counted)
        peers: dict[str, Callable[[], Work]] = {} if training else {**_peers.runtimes(pair.eager, images)}
        if device == "cuda":
            peers |= {name: partial(_peers.graphed, variants[of]) for name, of in (("graph", "eager"), ("fused graph", "fused"))}
        for peer in compilers:
            make_work = partial(_work, images=images, training=training)
            peers[peer] = partial(_peers.compiled, pair.eager, COMPILERS[peer], make_work, frozen=not training)
        work.add_peers(peers, LARGEST[dtype])
        if device == "cuda":
            counted["launches"] = {variant: _launches_on_gpu(each) for variant, each in variants.items()}
            counted["peak"] = _memory.peaks_on_gpu(models, variants)
        else:
            job = (name, dtype, batch, training, device, backend, size)
            counted["peak"] = _memory.peaks_in_children({variant: partial(_variant, variant, *job) for variant in models})
        return work

    labels = {"model": name, "batch": batch, "dtype": short(dtype), "pass": direction}
    return Bench("model", labels, check, make, device, compilers)


def _work(model: nn.Module, images: Tensor, training: bool) -> Work:
    if training:
        return lambda: scores(training_step(model, images)).detach()  # nothing is kept of its graph
    return torch.no_grad()(lambda: model(images))


def _counted(models: Mapping[str, nn.Module], images: Tensor, training: bool) -> tuple[dict[str, Any], int]:
    """What is counted at the dispatcher, with the CPU kernels' costs: launches, bytes moved, ops that it does not know; for a training step
    bytes kept for its backward; and the eager network's operations.
    """
    works = {variant: _work(model, images, training) for variant, model in models.items()}
    for work in works.values():
        work()  # folds and packs
    counts = {variant: count(work) for variant, work in works.items()}
    found: dict[str, Any] = {}
    if images.device.type == "cpu":
        found["launches"] = {variant: c.launches for variant, c in counts.items()}
        found["traffic"] = {variant: c.bytes for variant, c in counts.items()}
        found["unknown"] = {variant: c.unknown for variant, c in counts.items() if c.unknown}
    if training:
        found["saved"] = {variant: saved_bytes(model, images) for variant, model in models.items()}
    return found, counts["eager"].flops


def _launches_on_gpu(work: Work) -> int:
    """Kernels, copies and fills that the device ran, as PyTorch's profiler saw them."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        work()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())
