"""Compares a backend with the reference in higher precision, by the contract that every op is held to.

The reference in float64 is the truth. A backend's largest error against it is at most twice eager PyTorch's in the same dtype (three
times for gradients), plus the case's absolute term; beside it stands a fixed bound, so that a bad eager result hides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._trees import leaves_of, mapped
from .ops._cases import Case, Maker, OpCases, rooms

# Largest error relative to the largest true value that is ever accepted: 16 units in the last place, and for float64 and
# float32 as many again as sums over some ten thousand terms lose.
FIXED_BOUND = {torch.float64: 1e-11, torch.float32: 2e-4, torch.float16: 0.016, torch.bfloat16: 0.125}


def all_cases() -> list[OpCases]:
    """Every public op's cases, found in the rooms."""
    found: list[OpCases] = []
    for room in rooms():
        found += [room.CASES] if isinstance(room.CASES, OpCases) else room.CASES
    return found


@dataclass(frozen=True)
class Comparison:
    """Largest absolute errors against float64 of one output or gradient, and the bound that `error` must keep."""

    what: str
    error: float
    eager_error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False for NaN


def max_error(actual: Tensor, truth: Tensor) -> float:
    """The largest absolute difference; infinite where one is NaN or infinite and the other is not the same."""
    if actual.shape != truth.shape:
        raise AssertionError(f"expected shape {tuple(truth.shape)}, got {tuple(actual.shape)}")
    if truth.numel() == 0:
        return 0.0
    actual = actual.detach().to(torch.float64)
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    difference = (actual - truth).abs().masked_fill(same, 0.0)
    return difference.nan_to_num(nan=float("inf")).max().item()


def judge(
    what: str,
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    factor: float,
    rounding: float,
    summation: float = 0.0,
    dtype: torch.dtype,
) -> Comparison:
    """Hold one tensor to the contract: `factor` times eager's error plus units in the last place of the largest value, `rounding` of
    them in the tensor's dtype and `summation` in the accumulator's."""
    finite = truth[truth.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    eager_error = max_error(eager, truth)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    units = rounding * torch.finfo(dtype).eps + summation * torch.finfo(accumulator).eps
    if dtype == torch.float64:
        units *= 4  # the truth is eager's own float64: its sums err as much, and no error of eager's widens the bound
    bound = factor * eager_error + units * scale
    bound = min(bound, FIXED_BOUND[dtype] * max(scale, 1.0))
    return Comparison(what, max_error(actual, truth), eager_error, bound)


@dataclass
class _Run:
    """One call of an op: its result, and the leaves to differentiate for."""

    out: Tensor
    leaves: list[Tensor]

    @classmethod
    def of(cls, op_cases: OpCases, inputs: Any, backend: str | None) -> _Run:
        args, kwargs = inputs
        leaves = leaves_of(inputs)
        return cls(op_cases.op(*args, **kwargs, backend=backend), leaves)

    def results(self, grad_out: Tensor | None) -> dict[str, Tensor]:
        found = {"out": self.out}
        if grad_out is not None and self.leaves:
            found |= zip(
                (f"grad {i}" for i in range(len(self.leaves))),
                torch.autograd.grad(self.out, self.leaves, grad_out.to(self.out.dtype)),
                strict=True,
            )
        return found


def _same_side_of_the_kink(grad_out: Tensor, outs: list[Tensor]) -> Tensor:
    """grad_out without the elements that rounding moved across ReLU's kink, where the gradient jumps and no bound could hold."""
    positive = [out.detach() > 0 for out in outs]
    agree = torch.stack([p == positive[0] for p in positive]).all(0)
    if agree.numel() and agree.double().mean() < 0.97:
        raise AssertionError("more than 3% of the outputs differ in sign from the float64 reference")
    return grad_out.masked_fill_(~agree, 0.0)  # in place: keeps the layout under test


def compare(
    op_cases: OpCases,
    case: Case,
    backend: str | None,
    dtype: torch.dtype,
    layout: str = "channels_last",
    device: str = "cpu",
    *,
    backward: bool = True,
) -> Iterator[Comparison]:
    """Run a case forward and backward through a backend, eager PyTorch and float64; yield how each result compares."""
    # Eager's own gradients on a GPU do not take memory that is not on 16 bytes: it gets the same values on such.
    theirs = "channels_last" if layout == "offset" and torch.device(device).type == "cuda" else layout

    def inputs(layout: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return op_cases.make(case, Maker(dtype, layout, device, grad=backward))

    def to_float64(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        return leaf.detach().to(torch.float64).requires_grad_(leaf.requires_grad)

    runs = [
        _Run.of(op_cases, mapped(to_float64, inputs(theirs), Tensor), "reference"),
        _Run.of(op_cases, inputs(theirs), "reference"),
        _Run.of(op_cases, inputs(layout), backend),
    ]
    grad_out = None
    if backward:
        grad_out = Maker(dtype, layout, device, seed=1, grad=False).activation(*runs[0].out.shape)
        grad_out = _same_side_of_the_kink(grad_out, [run.out for run in runs])
    aligned = grad_out if theirs == layout or grad_out is None else grad_out.clone()
    truth, eager, actual = (run.results(grad) for run, grad in zip(runs, (aligned, aligned, grad_out), strict=True))
    for what, true_value in truth.items():
        if actual[what].dtype != eager[what].dtype:
            raise AssertionError(f"{what}: expected dtype {eager[what].dtype}, got {actual[what].dtype}")
        factor = 2.0 if what == "out" else 3.0
        yield judge(
            what,
            actual[what],
            eager[what],
            true_value,
            factor=factor,
            rounding=op_cases.rounding,
            summation=op_cases.summation,
            dtype=dtype,
        )
