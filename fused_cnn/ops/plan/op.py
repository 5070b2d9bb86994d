"""run_plan, run_plan_into: a network in eval form as one op, step after step, its activations in one arena.

Values are activations (N, C, H, W), numbered: the inputs, then each step's result. csrc/plan/program.h says how a step
is written as numbers; `encode` does so, and `decode` reads them back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._layout import empty_nchw
from ..._library import cpu, define
from .._conv import out_size
from .._flops import flop_formula
from ..conv.stage import GEOMETRY, fake_stage, stage_flops
from ..inception.op import OUTPUTS, same_size_flops, weight_shapes


class Kind(IntEnum):
    """Of a step."""

    CONVOLUTION = 0
    MAX_POOL = 1
    STAGE = 2
    INCEPTION = 3
    AVERAGE = 4
    CONCATENATION = 5


class Step(NamedTuple):
    """One step. `reads` are values (a convolution's residual is the second), `constants` the first of its weights and
    how many there are, `numbers` the rest: of a convolution its weight's shape, stride, padding, dilation and relu; of
    a max pool kernel, stride, padding, dilation and ceil_mode; of a stage blocks, shortcut, projects, each block's
    length, and each convolution's geometry; of an Inception block six channel counts and two kernel sizes."""

    kind: Kind
    reads: tuple[int, ...]
    constants: tuple[int, int] = (0, 0)
    numbers: tuple[int, ...] = ()

    def encode(self) -> list[int]:
        first = self.constants[0]
        if self.kind is Kind.CONVOLUTION:
            return [self.kind, self.reads[0], *(self.reads[1:] or (-1,)), first, *self.numbers]
        if self.kind in (Kind.STAGE, Kind.INCEPTION):
            return [self.kind, *self.reads, first, *self.numbers]
        if self.kind is Kind.CONCATENATION:
            return [self.kind, len(self.reads), *self.reads]
        return [self.kind, *self.reads, *self.numbers]

    def stage(self) -> tuple[Sequence[int], Sequence[int], bool, bool]:
        """Geometry, lengths, shortcut and projects, as residual_stage_packed_fwd takes them."""
        blocks, shortcut, projects, *rest = self.numbers
        return rest[blocks:], rest[:blocks], bool(shortcut), bool(projects)

    def inception(self, channels: int) -> list[tuple[int, int, int, int]]:
        """The six weights' shapes of a block of so many channels."""
        widths = self.numbers[:6]
        return weight_shapes(channels, widths, self.numbers[6:])


def encode(steps: Sequence[Step]) -> list[int]:
    return list(chain.from_iterable(step.encode() for step in steps))


def decode(program: Sequence[int]) -> Iterator[Step]:
    """The steps of a program that is right: the kernel checks it."""
    numbers = iter(program)

    def take(count: int) -> tuple[int, ...]:
        return tuple(next(numbers) for _ in range(count))

    for number in numbers:
        kind = Kind(number)
        if kind is Kind.CONVOLUTION:
            x, residual, first = take(3)
            yield Step(kind, (x,) if residual < 0 else (x, residual), (first, 1), take(11))
        elif kind is Kind.MAX_POOL:
            yield Step(kind, take(1), numbers=take(9))
        elif kind is Kind.STAGE:
            x, first, *how = take(5)
            lengths = take(how[0])
            count = sum(lengths) + how[2]
            yield Step(kind, (x,), (first, count), (*how, *lengths, *take(GEOMETRY * count)))
        elif kind is Kind.INCEPTION:
            x, first = take(2)
            yield Step(kind, (x,), (first, 4), take(8))
        else:
            yield Step(kind, take(1) if kind is Kind.AVERAGE else take(next(numbers)))


def results_of(steps: Sequence[Step], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Every value, the inputs first: uninitialised tensors such as `inputs`, of their shapes."""
    values = list(inputs)
    size: Sequence[int]
    for step in steps:
        x = values[step.reads[0]]
        if step.kind is Kind.CONVOLUTION:
            out, _, kh, kw, sh, sw, ph, pw, dh, dw, _ = step.numbers
            size = out, out_size(x.size(2), kh, sh, ph, dh), out_size(x.size(3), kw, sw, pw, dw)
        elif step.kind is Kind.MAX_POOL:
            kh, kw, sh, sw, ph, pw, dh, dw, ceil = step.numbers
            sides = out_size(x.size(2), kh, sh, ph, dh, bool(ceil)), out_size(x.size(3), kw, sw, pw, dw, bool(ceil))
            size = x.size(1), *sides
        elif step.kind is Kind.STAGE:
            size = fake_stage(x, *step.stage()).shape[1:]
        elif step.kind is Kind.INCEPTION:
            size = sum(step.numbers[i] for i in OUTPUTS), *x.shape[2:]
        elif step.kind is Kind.AVERAGE:
            size = x.size(1), 1, 1
        else:
            size = sum(values[i].size(1) for i in step.reads), *x.shape[2:]
        values.append(empty_nchw(inputs[0], *size))
    return values


def _fake(inputs: Sequence[Tensor], constants: Any, program: Sequence[int], results: Sequence[int]) -> Any:
    values = results_of(list(decode(program)), inputs)
    return [values[i] for i in results]


define(
    # int, not SymInt, of which each takes as long as five: a network's geometry is never dynamic.
    "run_plan(Tensor[] inputs, Tensor[] constants, int[] program, int[] results) -> Tensor[]",
    _fake,
)
# The same, with the results' memory, channels_last, and the activations': what a plan that is called again calls.
define(
    "run_plan_into(Tensor[] inputs, Tensor[] constants, int[] program, int[] results, Tensor(a!)[] outs, "
    "Tensor(b!) arena, Tensor(c!)? seconds) -> ()",
    lambda *_: None,
)


def step_flops(step: Step, values: Sequence[Tensor], out: Tensor) -> int:
    """Of its convolutions, direct ones."""
    x = values[step.reads[0]]
    if step.kind is Kind.CONVOLUTION:
        _, channels, kh, kw = step.numbers[:4]
        return 2 * out.numel() * channels * kh * kw
    if step.kind is Kind.STAGE:
        return stage_flops(x, (), *step.stage(), out_val=out)
    if step.kind is Kind.INCEPTION:
        return same_size_flops(x, step.inception(x.size(1)))
    return 0


@flop_formula("run_plan", "run_plan_into")
def _flops(inputs: Sequence[Tensor], constants: Any, program: Sequence[int], *_: Any, out_val: Any) -> int:
    steps = list(decode(program))
    values = results_of(steps, [x.to("meta") for x in inputs])
    return sum(step_flops(step, values, out) for step, out in zip(steps, values[len(inputs) :], strict=True))


def arena_bytes(inputs: Sequence[Tensor], program: Sequence[int], results: Sequence[int]) -> tuple[int, int]:
    """The bytes of a program's arena on inputs such as these, on a CPU with as many threads as PyTorch uses now; and of
    one in which no two activations share memory.

    Raises:
        ValueError: the program is wrong.
    """
    assert cpu.loaded is not None
    function = cpu.loaded.fused_cnn_plan_bytes
    function.restype = ctypes.c_int64

    def array(numbers: Sequence[int]) -> Any:
        return (ctypes.c_int64 * len(numbers))(*numbers), ctypes.c_int64(len(numbers))

    if not inputs or any(x.dim() != 4 for x in inputs):
        raise ValueError(f"run_plan: inputs must have 4 dimensions, got {[tuple(x.shape) for x in inputs]}")
    sizes, _ = array(list(chain.from_iterable(x.shape for x in inputs)))
    bfloat16 = ctypes.c_bool(inputs[0].dtype == torch.bfloat16)
    without_overlap, message = ctypes.c_int64(), ctypes.create_string_buffer(512)
    found = function(
        sizes,
        ctypes.c_int64(len(inputs)),
        bfloat16,
        *array(program),
        *array(results),
        ctypes.byref(without_overlap),
        message,
        ctypes.c_int64(len(message)),
    )
    if found < 0:
        raise ValueError(message.value.decode())
    return found, without_overlap.value
