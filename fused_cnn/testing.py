"""Compares a backend with the reference in higher precision, by the contract that ops and networks are held to.

The reference in float64 is the truth. The largest error against it is at most twice eager PyTorch's in the same dtype
(three times for gradients) plus an absolute term. Beside it stands a fixed bound, lest a bad eager result hide a worse
one; what is no further off than eager itself, as where both call the same kernel of a library, it does not refuse.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ._trees import leaves_of, mapped
from .ops._cases import Case, Maker, OpCases, rooms

OUT_FACTOR, GRAD_FACTOR = 2.0, 3.0  # of eager's error
# Largest error relative to the largest true value that an op may have where eager's own is no larger: 16 units in the
# last place, and for float64 and float32 as many again as sums over some ten thousand terms lose.
FIXED_BOUND = {torch.float64: 1e-11, torch.float32: 2e-4, torch.float16: 0.016, torch.bfloat16: 0.125}


def all_cases() -> list[OpCases]:
    """Every public op's cases, found in the rooms: `ops/<room>/cases.py` holds CASES, one OpCases or several."""
    of_rooms = ([room.CASES] if isinstance(room.CASES, OpCases) else room.CASES for room in rooms())
    return list(itertools.chain.from_iterable(of_rooms))


@dataclass(frozen=True)
class Comparison:
    """One tensor's largest error against the truth, eager PyTorch's own, and the bound that `error` must keep: absolute
    for an op, relative to the largest true value for a network, which states its `difference` from eager, too, and of a
    training step's tensors how many elements are off by more than rounding: where few are, an activation fell on the
    other side of ReLU or of a maximum; where all are, something is wrong."""

    name: str
    error: float
    eager_error: float
    bound: float
    difference: float | None = None
    beyond_rounding: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False for NaN

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def max_error(actual: Tensor, truth: Tensor) -> float:
    """The largest absolute difference; infinite where one is NaN or infinite and the other is not the same."""
    if actual.shape != truth.shape:
        raise AssertionError(f"expected shape {tuple(truth.shape)}, got {tuple(actual.shape)}")
    if truth.numel() == 0:
        return 0.0
    actual = actual.detach().to(torch.float64)
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    difference = (actual - truth).abs().masked_fill(same, 0.0)
    return difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()


def relative(actual: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest true value."""
    return max_error(actual, truth.double()) / max(truth.abs().max().item(), 1e-30)


def bound_of(eager_error: float, factor: float, absolute: float, largest: float = math.inf) -> float:
    """The contract: an error is at most `factor` times eager's own plus `absolute`, and at most `largest` or, where
    eager's own is more than that, eager's own. An infinite one is no measure: `largest` alone then holds."""
    return min(factor * eager_error + absolute, max(largest, eager_error if math.isfinite(eager_error) else 0.0))


def judge(
    name: str,
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    factor: float,
    rounding: float,
    summation: float = 0.0,
    dtype: torch.dtype,
) -> Comparison:
    """Hold one of an op's tensors to the contract. Its absolute term is units in the last place of the largest true
    value: `rounding` of them in the tensor's dtype and `summation` in the accumulator's."""
    finite = truth[truth.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    units = rounding * torch.finfo(dtype).eps + summation * torch.finfo(accumulator).eps
    if dtype == torch.float64:
        units *= 4  # the truth is eager's own float64: its sums err as much, and no error of eager's widens the bound
    eager_error = max_error(eager, truth)
    bound = bound_of(eager_error, factor, units * scale, largest=FIXED_BOUND[dtype] * max(scale, 1.0))
    return Comparison(name, max_error(actual, truth), eager_error, bound)


def _results(out: Tensor, leaves: list[Tensor], grad_out: Tensor | None) -> dict[str, Tensor]:
    """What one call of an op computed: its result, and given grad_out the gradients of its leaves."""
    grads = torch.autograd.grad(out, leaves, grad_out.to(out.dtype)) if grad_out is not None and leaves else ()
    return {"out": out, **{f"grad {i}": grad for i, grad in enumerate(grads)}}


def _same_side_of_the_kink(grad_out: Tensor, outs: list[Tensor]) -> Tensor:
    """grad_out without the elements that rounding moved across ReLU's kink, where the gradient jumps past any bound."""
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
    backward = backward and not op_cases.gradient_jumps
    # Eager's own gradients on a GPU do not take memory that is not on 16 bytes: it gets the same values on such.
    theirs = "channels_last" if layout == "offset" and torch.device(device).type == "cuda" else layout
    if op_cases.name in ("max_pool2d", "stem") and torch.device(device).type == "cuda":
        theirs = "contiguous"  # float64 pools of channels_last end in a misaligned address there (PyTorch 2.11)

    def inputs(layout: str) -> Any:
        return op_cases.make(case, Maker(dtype, layout, device, grad=backward))

    def to_float64(t: Tensor) -> Tensor:
        return t.detach().to(torch.float64).requires_grad_(t.requires_grad) if t.is_floating_point() else t

    given = [mapped(to_float64, inputs(theirs), Tensor), inputs(theirs), inputs(layout)]
    backends = ("reference", "reference", backend)
    outs = [op_cases.op(*args, **kwargs, backend=b) for (args, kwargs), b in zip(given, backends, strict=True)]
    grad_out = None
    if backward:
        grad_out = Maker(dtype, layout, device, seed=1, grad=False).activation(*outs[0].shape)
        grad_out = _same_side_of_the_kink(grad_out, outs)
    aligned = grad_out if theirs == layout or grad_out is None else grad_out.clone()
    truth, eager, actual = map(_results, outs, map(leaves_of, given), (aligned, aligned, grad_out))
    for what, true_value in truth.items():
        if actual[what].dtype != eager[what].dtype:
            raise AssertionError(f"{what}: expected dtype {eager[what].dtype}, got {actual[what].dtype}")
        factor = OUT_FACTOR if what == "out" else GRAD_FACTOR
        units = {"rounding": op_cases.rounding, "summation": op_cases.summation}
        yield judge(what, actual[what], eager[what], true_value, factor=factor, **units, dtype=dtype)
