"""What `fused-cnn bench` and `pytest benchmarks` time: any piece of work, and every op's real cases.

A Bench checks its numbers before it is timed; its variants (eager, the peers at hand, fused) do the same work on the
same tensors and are timed in interleaved rounds. Bytes are the least that the work can move and operations a direct
convolution's; the limit is that of the operations which the fused variant really does (`flops_done`: fewer in
Winograd's form).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _backends, _library
from .._trees import leaves_of
from ..analysis import count
from ..measure import Work, interleaved
from ..ops._cases import Case, Maker, OpCases
from ..testing import all_cases, compare, relative
from . import peers
from .ceilings import Ceilings, short
from .numbers import LARGEST
from .results import Row
from .worker import Worker, described

# By device, where none are asked for.
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16)}
BATCHES = {"cpu": (1, 8), "cuda": (32, 256, 1)}
Makers = Mapping[str, Callable[[], Work]]


@dataclass
class Prepared:
    """Work ready to be timed: its variants, its least bytes, its floating-point operations, and for the row what was
    counted of it. `captures` come after all other variants: one that fails leaves its process unfit for more."""

    variants: dict[str, Work]
    bytes: int
    flops: int
    counted: dict[str, Any] = field(default_factory=dict)
    captures: Makers = field(default_factory=dict)

    def add_peers(self, makers: Makers, bound: float) -> None:
        """Add the peers that can be made and whose result is eager's within `bound`; of others `absent` says why."""
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


@dataclass(frozen=True, kw_only=True)
class Bench(ABC):
    """One piece of work: what it is, how to check it, and its variants. Pickled, and made ready where it runs."""

    dtype: torch.dtype
    device: str
    backend: str | None = None
    compilers: tuple[str, ...] = ()

    kind: ClassVar[str]

    @property
    @abstractmethod
    def labels(self) -> Row:
        """What tells this row from others."""

    @abstractmethod
    def check(self) -> None:
        """Raises AssertionError where the fused variant's numbers are wrong."""

    @abstractmethod
    def make(self) -> Prepared:
        """Prepare the work, with `compilers` among its variants."""

    @property
    def name(self) -> str:
        return "-".join(str(v) for v in self.labels.values()).replace(" ", "_")

    @property
    def room(self) -> str:
        """Rows of one room share a process: all of an op; a network's row has one of its own."""
        return self.labels.get("op", self.name)

    def run(self, seconds: float, ceilings: Ceilings, check: bool = True) -> Row:
        """Check, then time for so long; returns the row as JSON. `limit` is in seconds."""
        if check:
            self.check()
        if self.compilers:
            torch.compiler.reset()  # forgets the row before; within a row nothing may be forgotten
        work = self.make()
        cold = self.kind == "op" and self.device == "cuda"  # a layer's tensors would stay in the second-level cache
        timings = interleaved(work.variants, self.device, seconds, cold=cold)
        if work.captures:
            work.add_peers(work.captures, LARGEST[self.dtype])
            made = {name: work.variants[name] for name in work.captures if name in work.variants}
            try:
                timings |= interleaved(made, self.device, seconds, cold=cold) if made else {}
            except Exception as error:  # in a process that another capture has left unfit
                work.counted.setdefault("absent", {}).update(dict.fromkeys(made, described(error)))
        done = work.flops - (count(work.variants["fused"]).flops_saved if self.device == "cpu" else 0)
        limit, bound = ceilings.limit(work.bytes, done, short(self.dtype))
        medians = {name: t.median for name, t in timings.items()}
        return {
            "kind": self.kind,
            **self.labels,
            "bytes": work.bytes,
            "flops": work.flops,
            "flops_done": done,
            "limit": limit,
            "bound": bound,
            **work.counted,
            "times": {name: asdict(t) for name, t in timings.items()},
            "ratios": {name: medians["eager"] / t for name, t in medians.items() if name != "eager"},
            "gb_per_s": {name: work.bytes / t / 1e9 for name, t in medians.items()},
            "tflop_per_s": {name: work.flops / t / 1e12 for name, t in medians.items()},
            "share_of_limit": {name: limit / t for name, t in medians.items()},
        }


def measured(worker: Worker, bench: Bench, seconds: float, ceilings: Ceilings, check: bool = True) -> Row:
    """The bench's row, run in a process of its room's."""
    return worker.row({"kind": bench.kind, **bench.labels}, bench.room, bench.run, seconds, ceilings, check)


def op_benches(
    dtypes: Sequence[torch.dtype], batches: Sequence[int], *, only: Sequence[str] = (), telling: bool = False, **of: Any
) -> Iterator[OpBench]:
    """Every op x real case x batch x dtype, forward and backward; channels_last. `telling`: two cases of each op. `of`
    is what the benches have in common."""
    for batch, op_cases in itertools.product(batches, all_cases()):
        if not only or op_cases.name in only:
            real = [c.batched(batch) for c in op_cases.cases if c.real]
            cases = extremes(op_cases, real) if telling else real
            for case, dtype, direction in itertools.product(cases, dtypes, ("forward", "backward")):
                yield OpBench(op=op_cases.name, case=case, dtype=dtype, direction=direction, **of)


def extremes(op_cases: OpCases, cases: Iterable[Case]) -> list[Case]:
    """The cases that differ most: least arithmetic for each byte (of equals the largest), and most (the smallest)."""

    def intensity(case: Case) -> tuple[float, int]:
        cost = op_cases.cost(case, 4)
        return round(cost.forward_flops / cost.forward_bytes, 2), -cost.forward_bytes

    ordered = sorted(cases, key=intensity)
    return [ordered[0], ordered[-1]]


@dataclass(frozen=True, kw_only=True)
class OpBench(Bench):
    """An op on one layer, forward or backward."""

    op: str
    case: Case
    direction: str

    kind = "op"

    @property
    def labels(self) -> Row:
        of = {"op": self.op, "case": self.case.name, "batch": self.case.shape[0]}
        return {**of, "dtype": short(self.dtype), "pass": self.direction}

    @property
    def backward(self) -> bool:
        return self.direction == "backward"

    @property
    def _cases(self) -> OpCases:
        return next(op_cases for op_cases in all_cases() if op_cases.name == self.op)

    @property
    def _by_name(self) -> list[str]:
        """The GPU's backends that implement the op here: each is a variant of its own there."""
        if self.device == "cpu":
            return []
        on = [b for b in ("native", "triton") if _backends.status(b, self.device).on]
        return [b for b in on if _library.has_kernel(self._cases.decides, b, self.device)]

    def check(self) -> None:
        where = f"{self.op}, {self.case.name}, {short(self.dtype)}"
        options: dict[str, Any] = {"device": self.device, "backward": self.backward}
        for chosen in (self.backend, *self._by_name):
            for comparison in compare(self._cases, self.case, chosen, self.dtype, **options):
                assert comparison.ok, f"{where}, {chosen or 'auto'}: {comparison}"

    def make(self) -> Prepared:
        op_cases = self._cases
        backends = {"eager": "reference", "fused": self.backend, **{name: name for name in self._by_name}}
        variants = {name: self._variant(op_cases.op, backend=backend) for name, backend in backends.items()}
        cost = vars(op_cases.cost(self.case, self.dtype.itemsize))
        work = Prepared(variants, cost[f"{self.direction}_bytes"], cost[f"{self.direction}_flops"])
        if self.op in ("conv1x1_bias_relu", "conv_bias_relu") and not self.backward:
            work.add_peers({"library": lambda: self._variant(peers.fused_convolution)}, LARGEST[self.dtype])
        for name, (of, options) in peers.COMPILERS.items():
            if name in self.compilers and of == "eager":
                variants[name] = self._variant(torch.compile(op_cases.op, **options), backend="reference")
        return work

    def _variant(self, function: Callable[..., Tensor], **chosen: Any) -> Work:
        args, kwargs = self._cases.make(self.case, Maker(self.dtype, device=self.device, grad=self.backward))

        def forward() -> Tensor:
            return function(*args, **kwargs, **chosen)

        if not self.backward:
            return torch.no_grad()(forward)
        leaves = leaves_of((args, kwargs))
        result = forward()
        grad = torch.randn_like(result)
        return lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True)
