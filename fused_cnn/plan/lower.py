"""Lowering: a recording's calls as steps of programs that the CPU's native library runs by itself (ops/plan/op.py).

What it knows is joined to the longest programs that there are; what it does not stays a call of PyTorch's between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._library import kernel
from ..ops.plan.op import Kind, Step, encode
from .record import Call, Tape, Value, values_in

LINEAR = ("aten::addmm", "aten::mm")
DTYPES = (torch.float32, torch.bfloat16)  # the engine's


class Repack(NamedTuple):
    """A packed weight of the plan's own, of a linear layer's `weight` (in, out) and `bias`."""

    packed: Tensor
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Repack:
        return cls(cls._pack(weight, bias), weight, bias)

    @staticmethod
    def _pack(weight: Tensor, bias: Tensor | None) -> Tensor:
        packed: Tensor = kernel("conv_bias_relu_pack", "native")(weight.t()[..., None, None], bias, (1, 1), (1, 1))
        return packed

    def again(self) -> None:
        self.packed.copy_(self._pack(self.weight, self.bias))


class Delivery(NamedTuple):
    """A value that a program gives: its number in the recording, its place among the program's results, and whether it
    is (N, C) of what is (N, C, 1, 1) there."""

    number: int
    place: int
    flat: bool

    def of(self, results: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
        """The value, in the recording's memory format, on which what comes behind it may rely."""
        out = results[self.place]
        if self.flat:
            return out.flatten(1)
        is_nhwc = like[self.number].is_contiguous(memory_format=torch.channels_last)
        return out.contiguous(memory_format=torch.channels_last if is_nhwc else torch.contiguous_format)


class Program(NamedTuple):
    """Steps that run as one call: `inputs` are the recording's values; `calls` says of which of its calls each step
    was made."""

    inputs: list[int]
    steps: list[Step]
    constants: list[Tensor]
    results: list[int]
    deliveries: list[Delivery]
    calls: list[int]
    numbers: list[int]


class Lowered(NamedTuple):
    """What is run in order, programs and calls (by their place in the recording), and the weights packed for it."""

    parts: list[Program | int]
    repacks: list[Repack]


def lower(tape: Tape) -> Lowered:
    """A recording on a CPU as programs, as far as the native library knows its calls."""
    lowering = _Lowering(tape)
    for index, call in enumerate(tape.calls):
        rule = _RULES.get(call.name)
        if rule is None or not rule(lowering, index, call):
            lowering.close(index)
            lowering.parts.append(index)
    lowering.close(len(tape.calls))
    return Lowered(lowering.parts, lowering.repacks)


class _Lowering:
    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.parts: list[Program | int] = []
        self.repacks: list[Repack] = []
        self.returned = set(values_in(tape.result))
        self.uses: dict[int, list[int]] = {}  # by value, the calls that read it
        for i, call in enumerate(tape.calls):
            for n in values_in((call.args, call.kwargs)):
                self.uses.setdefault(n, []).append(i)
        self._open()

    def _open(self) -> None:
        self.inputs: list[int] = []
        self.steps: list[Step] = []
        self.calls: list[int] = []
        self.constants: list[Tensor] = []
        # By the recording's value: its place in the open program, a step's number or -1 - an input's, as the inputs are
        # not all known yet; and whether it is flat there.
        self.where: dict[int, tuple[int, bool]] = {}

    # Rules ask for values and add steps.

    def read(self, value: Any, *, flat: bool = False) -> int | None:
        """A value's place in the open program, as an image or (`flat`) as (N, C); None where it has none."""
        if not isinstance(value, Value):
            return None
        found = self.where.get(value.number)
        if found is not None:
            return found[0] if found[1] == flat else None
        like = self.tape.like[value.number]
        if flat or like.dim() != 4 or like.dtype not in DTYPES or not self._fits(like):
            return None
        self.inputs.append(value.number)
        self.where[value.number] = -len(self.inputs), False
        return -len(self.inputs)

    def all(self, values: Sequence[Any]) -> list[int] | None:
        """The places of several images; None where one has none."""
        found = [place for place in map(self.read, values) if place is not None]
        return found if len(found) == len(values) else None

    def _fits(self, like: Tensor) -> bool:
        others = [self.tape.like[n] for n in self.inputs]
        return all((t.dtype, t.size(0)) == (like.dtype, like.size(0)) for t in others)

    def add(
        self,
        index: int,
        kind: Kind,
        reads: Sequence[int],
        numbers: Sequence[int] = (),
        constants: Sequence[Tensor] = (),
        *,
        flat: bool = False,
    ) -> bool:
        first = len(self.constants)
        self.constants += constants
        self.steps.append(Step(kind, tuple(reads), (first, len(constants)), tuple(map(int, numbers))))
        self.calls.append(index)
        return self.alias(index, len(self.steps) - 1, flat=flat)

    def alias(self, index: int, place: int, *, flat: bool) -> bool:
        """Say that a call's result is what lies there."""
        (number,) = values_in(self.tape.calls[index].results)
        self.where[number] = place, flat
        return True

    def close(self, index: int) -> None:
        """End the open program; what is read from call `index` on it must give."""
        if self.steps:
            wanted = {
                n: place
                for n, place in self.where.items()
                if place[0] >= 0 and (n in self.returned or any(i >= index for i in self.uses.get(n, ())))
            }
            places = list(dict.fromkeys(place for place, _ in wanted.values()))
            behind = len(self.inputs)
            steps = [s._replace(reads=tuple(behind + r if r >= 0 else -1 - r for r in s.reads)) for s in self.steps]
            deliveries = [Delivery(n, places.index(place), flat) for n, (place, flat) in wanted.items()]
            results = [behind + place for place in places]
            self.parts.append(
                Program(self.inputs, steps, self.constants, results, deliveries, self.calls, encode(steps))
            )
        self._open()


Rule = Callable[[_Lowering, int, Call], bool]


def _convolution(to: _Lowering, index: int, call: Call) -> bool:
    x, packed, shape, residual, *window, relu = call.args
    reads = to.all([x] if residual is None else [x, residual])
    if reads is None:
        return False
    return to.add(index, Kind.CONVOLUTION, reads, [*shape, *chain(*window), relu], [packed])


def _max_pool(to: _Lowering, index: int, call: Call) -> bool:
    x, *window, ceil_mode = call.args
    read = to.read(x)
    return read is not None and to.add(index, Kind.MAX_POOL, [read], [*chain(*window), ceil_mode])


def _stage(to: _Lowering, index: int, call: Call) -> bool:
    x, packed, geometry, lengths, shortcut, projects = call.args
    read = to.read(x)
    numbers = [len(lengths), shortcut, projects, *lengths, *geometry]
    return read is not None and to.add(index, Kind.STAGE, [read], numbers, packed)


def _inception(to: _Lowering, index: int, call: Call) -> bool:
    x, packed, channels, kernels = call.args
    read = to.read(x)
    return read is not None and to.add(index, Kind.INCEPTION, [read], [*channels, *kernels], packed)


def _mean(to: _Lowering, index: int, call: Call) -> bool:
    x, dims, *rest = (*call.args, None)
    keeps = bool(rest and rest[0])
    if call.kwargs.get("dtype") is not None or not isinstance(x, Value) or to.tape.like[x.number].dim() != 4:
        return False
    read = to.read(x)
    if read is None or not dims or sorted(d % 4 for d in dims) != [2, 3]:
        return False
    return to.add(index, Kind.AVERAGE, [read], flat=not keeps)


def _average_pool(to: _Lowering, index: int, call: Call) -> bool:
    x, size = call.args
    read = to.read(x) if list(size) == [1, 1] else None
    return read is not None and to.add(index, Kind.AVERAGE, [read])


def _shape(to: _Lowering, index: int, call: Call) -> bool:
    """A view that leaves the elements where they are: the same shape, or (N, C) of (N, C, 1, 1) and back."""
    value = call.args[0]
    (result,) = values_in(call.results)
    found = to.where.get(value.number) if isinstance(value, Value) else None
    if found is None or found[0] < 0:
        return False
    if to.tape.like[value.number].dtype != to.tape.like[result].dtype:  # a view as another dtype
        return False
    before, after = (to.tape.like[n].shape for n in (value.number, result))
    whole = after if len(after) == 4 else before
    if len(whole) != 4 or whole[:2] != after[:2] or whole[:2] != before[:2]:
        return False
    if before != after and not (whole[2:] == (1, 1) and {len(before), len(after)} == {2, 4}):
        return False
    return to.alias(index, found[0], flat=len(after) == 2)


def _linear(to: _Lowering, index: int, call: Call) -> bool:
    bias, x, weight = call.args if len(call.args) == 3 else (None, *call.args)
    if not isinstance(weight, Tensor) or (bias is not None and not (isinstance(bias, Tensor) and bias.dim() == 1)):
        return False
    read = to.read(x, flat=True)
    if read is None or any(n != 1 for n in call.kwargs.values()) or weight.dtype != to.tape.like[x.number].dtype:
        return False
    channels, out = weight.shape
    if bias is not None and bias.size(0) != out:  # one value for all
        return False
    repack = Repack.of(weight, bias)
    to.repacks.append(repack)
    numbers = [out, channels, 1, 1, 1, 1, 0, 0, 1, 1, False]
    return to.add(index, Kind.CONVOLUTION, [read], numbers, [repack.packed], flat=True)


def _concatenation(to: _Lowering, index: int, call: Call) -> bool:
    values, dim = (*call.args, 0)[:2]
    if dim not in (1, -3) or not all(isinstance(v, Value) and to.tape.like[v.number].dim() == 4 for v in values):
        return False
    reads = to.all(values)
    return reads is not None and to.add(index, Kind.CONCATENATION, reads)


_RULES: dict[str, Rule] = {
    "fused_cnn::conv_bias_relu_packed_fwd": _convolution,
    "fused_cnn::max_pool2d_fwd": _max_pool,
    "fused_cnn::residual_stage_packed_fwd": _stage,
    "fused_cnn::inception_packed_fwd": _inception,
    "aten::mean": _mean,
    "aten::_adaptive_avg_pool2d": _average_pool,
    "aten::as_strided_": _shape,
    **dict.fromkeys(("aten::view", "aten::_unsafe_view", "aten::squeeze", "aten::unsqueeze"), _shape),
    **dict.fromkeys(LINEAR, _linear),
    "aten::cat": _concatenation,
}
