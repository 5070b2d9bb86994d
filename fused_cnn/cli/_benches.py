"""What is timed, for `fused-cnn bench` and for `pytest benchmarks` alike: every op's real cases and whole
networks.

A Bench checks its numbers before it is timed; its variants (eager, torch.compile, fused) do the same work on
the same tensors and are timed in interleaved rounds. Bytes are the least that the work can move, so GB/s says
how near the memory's limit a variant runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..analysis import minimum_traffic
from ..measure import Interleaved, Timing, Work
from ..ops._cases import Case, Maker, OpCases
from ..testing import all_cases, compare
from . import _networks
from ._numbers import Pair, compare_scores, compare_training, training_step

TRAINING_CHECK = (2, 96)  # images and pixels: float64 gradients in full size take minutes


@dataclass
class Bench:
    """One piece of work: what it is, how to check it, and its variants.

    `check` raises AssertionError where the fused variant's numbers are wrong. `make(compiled)` builds the
    variants, with torch.compile's or without, and the least number of bytes that the work moves, when it is
    timed and not before.
    """

    kind: str
    labels: dict[str, Any]
    check: Callable[[], None]
    make: Callable[[bool], tuple[dict[str, Work], int]]
    device: str
    compiled: bool = False

    @property
    def name(self) -> str:
        return "-".join(str(v) for v in self.labels.values()).replace(" ", "_")

    def row(self, timings: dict[str, Timing], least_bytes: int) -> dict[str, Any]:
        """The result as JSON."""
        eager = timings["eager"].median
        return {
            "kind": self.kind,
            **self.labels,
            "bytes": least_bytes,
            "times": {name: t.to_dict() for name, t in timings.items()},
            "ratios": {name: eager / t.median for name, t in timings.items() if name != "eager"},
            "gb_per_s": {name: least_bytes / t.median / 1e9 for name, t in timings.items()},
        }

    def run(self, seconds: float) -> dict[str, Any]:
        """Check, then time for so long; returns the row."""
        self.check()
        variants, least_bytes = self.make(self.compiled)
        return self.row(Interleaved(variants, self.device).run(seconds), least_bytes)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def op_benches(
    dtypes: Sequence[torch.dtype],
    *,
    device: str,
    batch: int = 1,
    backend: str | None = None,
    compiled: bool = False,
    only: Sequence[str] = (),
) -> Iterator[Bench]:
    """Every op x real case x dtype, forward and backward; channels_last."""
    for op_cases in all_cases():
        if only and op_cases.name not in only:
            continue
        for case in (c.batched(batch) for c in op_cases.cases if c.real):
            for dtype in dtypes:
                for direction in ("forward", "backward"):
                    yield _op_bench(op_cases, case, dtype, direction, device, backend, compiled)


def _op_bench(op_cases: OpCases, case: Case, dtype: torch.dtype, direction: str, device: str, backend: str | None, compiled: bool) -> Bench:
    backward = direction == "backward"

    def check() -> None:
        for comparison in compare(op_cases, case, backend, dtype, device=device, backward=backward):
            assert comparison.ok, f"{op_cases.name}, {case.name}, {short(dtype)}: {comparison}"

    def variant(function: Callable[..., Tensor], chosen: str | None) -> Work:
        args, kwargs = op_cases.make(case, Maker(dtype, device=device, grad=backward))

        def forward() -> Tensor:
            return function(*args, **kwargs, backend=chosen)

        if not backward:
            return torch.no_grad()(forward)
        leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        result = forward()
        grad = torch.randn_like(result)
        return lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True)

    def make(compiled: bool) -> tuple[dict[str, Work], int]:
        cost = op_cases.cost(case, dtype.itemsize)
        variants = {"eager": variant(op_cases.op, "reference"), "fused": variant(op_cases.op, backend)}
        if compiled:
            torch._dynamo.reset()
            variants["compile"] = variant(torch.compile(op_cases.op), "reference")
        return variants, cost.backward_bytes if backward else cost.forward_bytes

    labels = {"op": op_cases.name, "case": case.name, "batch": case.shape[0], "dtype": short(dtype), "pass": direction}
    return Bench("op", labels, check, make, device, compiled)


def model_benches(
    names: Sequence[str],
    dtypes: Sequence[torch.dtype],
    batches: Sequence[int],
    *,
    device: str,
    backend: str | None = None,
    compiled: bool = False,
    size: int = 224,
) -> Iterator[Bench]:
    """torchvision's networks with their BatchNorm statistics made real: inference at every batch, and a
    training step at the largest.
    """
    for name in names:
        for dtype in dtypes:
            for batch in batches:
                yield _model_bench(name, dtype, batch, "inference", device, backend, compiled, size)
            yield _model_bench(name, dtype, max(batches), "training step", device, backend, False, size)


def _model_bench(
    name: str, dtype: torch.dtype, batch: int, direction: str, device: str, backend: str | None, compiled: bool, size: int
) -> Bench:
    training = direction != "inference"

    def network(images: Tensor) -> nn.Module:
        return _networks.network(name, images.float()).to(dtype)

    def photographs(count: int, pixels: int) -> Tensor:
        return _networks.photographs(_networks.PHOTOGRAPHS, count, pixels).to(device, dtype)

    def check() -> None:
        count, pixels = TRAINING_CHECK
        images = photographs(count, pixels if training else size)
        pair = Pair.of(network(images), backend)
        numbers = compare_training(pair, images, in_float64=False)[0] if training else [compare_scores(pair, images)[0]]
        wrong = [n for n in numbers if not n.ok]
        assert not wrong, f"{name}, {short(dtype)}, {direction}: {wrong[0]}"

    def make(compiled: bool) -> tuple[dict[str, Work], int]:
        images = photographs(batch, size)
        pair = Pair.of(network(images), backend)
        pair = pair.training() if training else pair
        variants = {"eager": _work(pair.eager, images, training), "fused": _work(pair.fused, images, training)}
        if compiled:
            variants["compile"] = _work(_compile(pair.eager, images), images, training)
        return variants, minimum_traffic(pair.eager, images, backward=training).bytes

    labels = {"model": name, "batch": batch, "dtype": short(dtype), "pass": direction}
    return Bench("model", labels, check, make, device, compiled)


def _work(model: nn.Module, images: Tensor, training: bool) -> Work:
    if training:
        return lambda: training_step(model, images)
    return torch.no_grad()(lambda: model(images))


def _compile(model: nn.Module, images: Tensor) -> nn.Module:
    """torch.compile at its best for inference: weights frozen into the program."""
    import torch._inductor.config as config

    torch._dynamo.reset()
    with config.patch(freezing=True), torch.no_grad():
        compiled: nn.Module = torch.compile(copy.deepcopy(model))  # type: ignore[assignment]
        compiled(images)
    return compiled
