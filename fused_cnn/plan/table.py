"""A plan as a table: what runs each step and why, what it moves, what that must take at least and what it takes."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._library import cpu_level
from .._trees import tensors
from ..measure import interleaved
from ..nn import FusedModule
from ..ops.plan.op import Kind, Step, results_of
from .check import random_like
from .graph import GraphedPlan
from .lower import LINEAR, Program
from .optimized import OptimizedModel, _laid_out, _without_autocast
from .record import Call, of_values, values_in

if TYPE_CHECKING:
    from ..bench.ceilings import Ceilings
    from .plan import Plan

ROUNDS = 7  # that steps are timed in


@dataclass
class Row:
    """A step: its place, the module whose weights it reads, what runs it and why, its result's shape, the bytes that it
    reads and writes, its operations, the seconds that the device needs for these at least, what sets that limit
    (bench/ceilings.py: where it is the cache, the operations alone are a bound), and the seconds that it took."""

    step: int
    layer: str
    op: str
    runs: str
    why: str
    out: list[int]
    bytes: int
    flops: int
    predicted: float
    bound: str
    measured: float

    @property
    def of_the_limit(self) -> float:
        return self.predicted / self.measured if self.measured else 0.0


@dataclass
class Table:
    """`rows`, one a step; `arena` bytes that activations take, and what they would without sharing; `notes` in words:
    what was not fused, and why."""

    rows: list[Row]
    arena: int
    without_overlap: int
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, for JSON."""
        rows = [asdict(row) | {"of_the_limit": row.of_the_limit} for row in self.rows]
        return asdict(self) | {"rows": rows}

    def text(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows of text."""
        headings = ["step", "layer", "op", "runs", "why", "result", "MB", "GFLOP", "limit us", "us", "of the limit"]
        body = []
        for row in self.rows:
            shape = "x".join(map(str, row.out))
            figures = [f"{row.bytes / 1e6:.2f}", f"{row.flops / 1e9:.2f}"]
            share = f"{row.of_the_limit:.0%}" if row.predicted else "in cache"
            times = [f"{row.predicted * 1e6:.1f}" if row.predicted else "", f"{row.measured * 1e6:.1f}", share]
            body.append([str(row.step), row.layer, row.op, row.runs, row.why, shape, *figures, *times])
        return headings, body

    def __str__(self) -> str:
        headings, body = self.text()
        width = [max(len(line[i]) for line in (headings, *body)) for i in range(len(headings))]
        lines = ["  ".join(map(str.ljust, line, width)).rstrip() for line in (headings, *body)]
        return "\n".join([*lines, *self.notes])

    @classmethod
    def of(cls, optimized: OptimizedModel) -> Table:
        """Of the plan for the example's shape, whose steps are run and timed now."""
        notes = [f"not fused: {e.name} ({e.module}): {e.reason}" for e in optimized.report.skipped]
        if not any(isinstance(module, FusedModule) for module in optimized._fused.modules()):
            notes.append("nothing was fused: fuse_ knows none of these blocks")
        notes += [optimized.report.runs] if optimized.report.runs else []
        found = optimized._plans.get(optimized._example_shapes)
        if found is None:
            return cls([], 0, 0, [f"there is no plan: {optimized._reason or 'other shapes took its place'}", *notes])
        plan = found.plan if isinstance(found, GraphedPlan) else found
        limits = _ceilings(plan)
        with torch.inference_mode(False), torch.no_grad(), _without_autocast(plan.device.type):
            rows = _Rows(plan, optimized._fused, limits).timed()
        if isinstance(found, GraphedPlan):
            notes = [f"activations: {plan.bytes / 1e6:.1f} MB in a graph's pool", *notes]
        elif plan.bytes:
            arena, without = plan.bytes / 1e6, plan.bytes_without_overlap / 1e6
            notes = [f"activations: {arena:.1f} MB in one arena, {without:.1f} MB without sharing", *notes]
        return cls(rows, plan.bytes, plan.bytes_without_overlap, notes)


class _Rows:
    def __init__(self, plan: Plan, fused: nn.Module, limits: Ceilings) -> None:
        self.plan, self.names, self.limits = plan, _names(fused), limits
        self.like = plan.tape.like
        self.device = plan.device
        for call, made in plan.tape.derived:
            for t in made:
                self.names.setdefault(_address(t), self._layer(list(tensors((call.args, call.kwargs)))))
        for repack in plan.repacks:
            self.names[_address(repack.packed)] = self.names.get(_address(repack.weight), "")

    def timed(self) -> list[Row]:
        given = self.like[: self.plan.tape.inputs]
        inputs = [_laid_out(random_like(torch.empty_like(x, device=self.device), x.shape)) for x in given]
        values = dict(enumerate(inputs))
        rows: list[Row] = []
        for i, part in enumerate(self.plan.parts):
            if isinstance(part, Program):
                rows += self._program(i, part, values)
            else:
                rows += self._call(self.plan.tape.calls[part], values)
        for i, row in enumerate(rows, 1):
            row.step = i
        return rows

    def _row(self, layer: str, op: str, runs: str, why: str, out: Tensor, moved: int, flops: int, took: float) -> Row:
        name = str(out.dtype).removeprefix("torch.")
        name = name if name in self.limits.product else "float32"  # in which our kernels then compute
        predicted, bound = self.limits.limit(moved, flops, name) if out.is_floating_point() else (0.0, "")
        return Row(0, layer, op, runs, why, list(out.shape), moved, flops, predicted, bound, took)

    def _program(self, place: int, program: Program, values: dict[int, Tensor]) -> list[Row]:
        from ..ops.plan.cases import step_cost

        seconds = torch.zeros(len(program.steps), dtype=torch.float64)
        samples = []
        for _ in range(ROUNDS):
            self.plan.run_program(place, program, values, seconds)
            samples.append(seconds.tolist())
        taken = [statistics.median(of) for of in zip(*samples, strict=True)]
        known = results_of(program.steps, [self.like[n] for n in program.inputs])
        rows = []
        made = zip(program.steps, program.calls, known[len(program.inputs) :], taken, strict=True)
        for step, call, out, took in made:
            cost = step_cost(step, known, out, program.constants)
            why = "Winograd's form spares products" if cost.flops_saved else "the engine knows it"
            layer = self._layer(program.constants[step.constants[0] :][: step.constants[1]])
            op = "linear" if self.plan.tape.calls[call].name in LINEAR else _described(step)
            done = cost.flops - cost.flops_saved
            rows.append(self._row(layer, op, "native", why, out, cost.read + cost.written, done, took))
        return rows

    def _call(self, call: Call, values: dict[int, Tensor]) -> list[Row]:
        from ..analysis import count

        args, kwargs = of_values(lambda v: values[v.number], (call.args, call.kwargs))
        work = lambda: call.op(*args, **kwargs)  # noqa: E731
        result = work()
        for number, t in zip(values_in(call.results), tensors(result), strict=True):
            values[number] = t
        out = next(tensors(result), None)
        counts = count(work)
        if out is None or not counts.launches:  # a view
            return []
        if self.device.type == "cuda":
            took = interleaved({"": work}, self.device, 0.01, at_least=ROUNDS)[""].median
        else:
            samples = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                work()
                samples.append(time.perf_counter() - start)
            took = statistics.median(samples)
        backend = {"fused_cnn": "native", "fused_cnn_triton": "triton"}.get(call.op.namespace)
        why = f"{backend} knows it" if backend else "no step of ours"
        layer = self._layer(list(tensors((call.args, call.kwargs))))
        done = counts.flops - counts.flops_saved
        return [
            self._row(layer, call.name.partition("::")[2], backend or "PyTorch", why, out, counts.bytes, done, took)
        ]

    def _layer(self, constants: Sequence[Tensor]) -> str:
        return next((name for t in constants if (name := self.names.get(_address(t)))), "")


def _described(step: Step) -> str:
    op = step.kind.name.lower().replace("_", " ")
    if step.kind is Kind.CONVOLUTION:
        kh, kw = step.numbers[2:4]
        more = (" + residual" if len(step.reads) > 1 else "") + (" + ReLU" if step.numbers[-1] else "")
        return f"{kh}x{kw} {op}{more}"
    if step.kind is Kind.STAGE:
        blocks = step.numbers[0]
        return f"{blocks} residual block{'s' * (blocks > 1)}"
    return op


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _names(fused: nn.Module) -> dict[int, str]:
    """By address, the outermost module whose weights lie there, folded or as they are."""
    found: dict[int, str] = {}
    for name, module in fused.named_modules():
        if isinstance(module, FusedModule):
            for form in module._fused_owner.forms:
                for t in tensors(form.value):
                    found.setdefault(_address(t), name or "stem")
        for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            found.setdefault(_address(t), name)
    return found


def _ceilings(plan: Plan) -> Ceilings:
    dtypes = {x.dtype for x in plan.tape.like if x.is_floating_point()}
    if plan.device.type == "cpu" and cpu_level() not in ("avx512_bf16", "amx"):
        dtypes -= {torch.bfloat16, torch.float16}  # PyTorch's products in them would take a minute
    return _measured_ceilings(plan.device.type, tuple(sorted(dtypes, key=str)))


@functools.cache
def _measured_ceilings(device_type: str, dtypes: tuple[torch.dtype, ...]) -> Ceilings:
    from ..bench import ceilings

    return ceilings.measure(device_type, dtypes, seconds=0.3)
