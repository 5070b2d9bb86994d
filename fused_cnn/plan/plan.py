"""A plan: how a network runs on inputs of one shape, step by step; and what each step takes, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._library import kernel
from .._trees import mapped, tensors
from ..ops.plan.op import arena_bytes, results_of
from .lower import Program, Repack, lower
from .record import Call, Tape, of_values, values_in


class Plan:
    """A recording, lowered where it is of the CPU; good for inputs of the shapes, dtype and device that it was made
    of. Any thread may run it, and several at once.

    `bytes` is what activations take between the programs' inputs and results, and `bytes_without_overlap` what they
    would if none lay where another had been; both 0 on a GPU, where the graph's pool has them (graph.py). `gives_rows`
    says that each result has a row for each image.
    """

    def __init__(self, tape: Tape, inputs: Sequence[Tensor]) -> None:
        self.tape = tape
        self.device = inputs[0].device
        self.parts: list[Program | int] = list(range(len(tape.calls)))
        self.repacks: list[Repack] = []
        if all(x.is_cpu for x in inputs):
            self.parts, self.repacks = lower(tape)
        self._arenas: dict[int, list[Tensor]] = {}  # by the program's place, those that no thread uses just now
        self._outs: dict[int, list[Tensor]] = {}  # by the program's place, its results without memory
        self._last = self._last_uses()
        batch = inputs[0].size(0)
        results = [tape.like[n] for n in values_in(tape.result)]
        self.gives_rows = tape.is_of_values() and all(t.dim() > 0 and t.size(0) == batch for t in results)
        self._derived = {t.untyped_storage().data_ptr() for _, made in tape.derived for t in made}
        self.bytes = self.bytes_without_overlap = 0
        for place, part in enumerate(self.parts):
            if isinstance(part, Program):
                given = [tape.like[n] for n in part.inputs]
                values = results_of(part.steps, given)
                self._outs[place] = [values[i] for i in part.results]
                found = arena_bytes(given, part.numbers, part.results)
                self.bytes, self.bytes_without_overlap = self.bytes + found[0], self.bytes_without_overlap + found[1]

    def _last_uses(self) -> dict[int, list[int]]:
        """By part, the values that none behind it reads."""
        last: dict[int, int] = {}
        for i, part in enumerate(self.parts):
            for n in self._reads(part):
                last[n] = i
        for n in values_in(self.tape.result):
            last.pop(n, None)
        found: dict[int, list[int]] = {}
        for n, i in last.items():
            found.setdefault(i, []).append(n)
        return found

    def _reads(self, part: Program | int) -> list[int]:
        if isinstance(part, Program):
            return [*part.inputs, *(d.number for d in part.deliveries)]
        call = self.tape.calls[part]
        return values_in((call.args, call.kwargs, call.results))

    def run(self, inputs: Sequence[Tensor]) -> Any:
        """The network's result, in its own structure, of tensors of their own."""
        values = dict(enumerate(inputs))
        for i, part in enumerate(self.parts):
            if isinstance(part, Program):
                self.run_program(i, part, values)
            else:
                _run_call(self.tape.calls[part], values)
            for n in self._last.get(i, ()):
                values.pop(n, None)
        constants = mapped(self._own, self.tape.result, Tensor)
        return of_values(lambda v: values[v.number], constants)

    def _own(self, t: Tensor) -> Tensor:
        """A constant of the result: the plan's own is nobody else's to change; a parameter is what the model gives."""
        return t.clone() if t.untyped_storage().data_ptr() in self._derived else t

    def run_program(
        self, place: int, program: Program, values: dict[int, Tensor], seconds: Tensor | None = None
    ) -> None:
        """Take a program's inputs from `values` and add its results; `seconds` is told what each step took."""
        free = self._arenas.setdefault(place, [])
        inputs = [values[n] for n in program.inputs]
        try:
            arena = free.pop()  # one at a time, whatever other threads do
        except IndexError:
            size, _ = arena_bytes(inputs, program.numbers, program.results)
            with torch.inference_mode(False):  # it outlives the call
                arena = torch.empty(size + 64, dtype=torch.uint8, device="cpu")
                arena = arena[-arena.data_ptr() % 64 :]
        how: Any = {"device": "cpu", "memory_format": torch.channels_last}
        outs = [torch.empty(t.shape, dtype=t.dtype, **how) for t in self._outs[place]]
        kernel("run_plan_into", "native")(
            inputs, program.constants, program.numbers, program.results, outs, arena, seconds
        )
        free.append(arena)
        for delivery in program.deliveries:
            values[delivery.number] = delivery.of(outs, self.tape.like)

    def __reduce__(self) -> Any:
        raise TypeError("a plan has packed weights, which are good on this machine only: save the OptimizedModel")

    def refill(self) -> None:
        """Make what was made of weights again, in its place."""
        self.tape.derive_again()
        for repack in self.repacks:
            repack.again()


def _run_call(call: Call, values: dict[int, Tensor]) -> None:
    args, kwargs = of_values(lambda v: values[v.number], (call.args, call.kwargs))
    result = call.op(*args, **kwargs)
    for number, t in zip(values_in(call.results), tensors(result), strict=True):
        values[number] = t
