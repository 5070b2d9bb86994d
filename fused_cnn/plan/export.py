"""An optimised network for a process without Python: its plan as a graph of torch.export's, and as a package of
AOTInductor's, which a C++ program loads (examples/run_package.cpp).

A graph has the packed weights as constants, and a call of the op `run_plan` for each of the plan's programs. They are
packed for the instruction set that the processor has here (`fused_cnn_cpu_level`), and good where that is the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .._library import cpu_level, kernel
from .._trees import mapped, tensors
from .graph import GraphedPlan
from .lower import Program
from .optimized import OptimizedModel, _laid_out, _without_autocast
from .plan import Plan, _run_call
from .record import of_values

LEVEL = "fused_cnn_cpu_level"  # in a package's metadata, and the library's function that says what the processor has


def exported(optimized: OptimizedModel) -> torch.export.ExportedProgram:
    """The plan for the example's shape as a graph, for torch.export.save and whatever else takes one. What loads it
    needs fused_cnn, or its library (`_C.so`) alone where there is no Python; and the same instruction set as here.

    Args:
        optimized: of a network on a CPU. Its weights are copied as they are now.

    Returns:
        A program of the example's inputs: of their shapes, dtypes and memory formats, and no others.

    Raises:
        ValueError: the network is not on a CPU, or the example's shape has no plan; the message says why.
    """
    return _exported(optimized, copies=False)


def package(optimized: OptimizedModel, path: str | os.PathLike[str]) -> str:
    """Compile `exported(optimized)` with AOTInductor, which takes a C++ compiler and some seconds.

    Args:
        optimized: as for `exported`, whose errors are this function's too.
        path: of the package, which ends in .pt2.

    Returns:
        The package's path.
    """
    # Copies of constants are made once, at loading.
    options = {"aot_inductor.use_runtime_constant_folding": True, "aot_inductor.metadata": {LEVEL: cpu_level()}}
    return torch._inductor.aoti_compile_and_package(
        _exported(optimized, copies=True), package_path=os.fspath(path), inductor_configs=options
    )


def _exported(optimized: OptimizedModel, *, copies: bool) -> torch.export.ExportedProgram:
    example = [torch.zeros_like(x, device=optimized._device) for x in optimized._like]
    if any(not x.is_cpu for x in example):
        raise ValueError(f"exported: a network on a CPU is wanted, got one on {optimized._device}")
    plan = optimized._plans.get(optimized._example_shapes)
    if plan is None or isinstance(plan, GraphedPlan):
        why = optimized._reason or "other shapes took its place"
        raise ValueError(f"exported: the example's shape has no plan: {why}")
    with torch.no_grad(), _without_autocast("cpu"):
        return torch.export.export(_Planned(plan, copies=copies), tuple(example))


class _Planned(nn.Module):
    """A plan as a module, whose constants are buffers. `copies`: programs get copies of theirs, for AOTInductor's
    constants lie at multiples of 16 bytes, and packed weights at such of 64, as PyTorch's own tensors do."""

    def __init__(self, plan: Plan, *, copies: bool) -> None:
        super().__init__()
        self.plan, self.copies = plan, copies
        self.names: dict[int, str] = {}  # by the tensor's id
        for t in chain.from_iterable(map(self._constants, plan.parts)):
            if id(t) not in self.names:
                self.names[id(t)] = f"constant{len(self.names)}"
                self.register_buffer(self.names[id(t)], t.detach().clone())

    def forward(self, *inputs: Tensor) -> Any:
        values = {number: _laid_out(x) for number, x in enumerate(inputs)}
        for part in self.plan.parts:
            if isinstance(part, Program):
                made = kernel("run_plan", "native")(
                    [values[n] for n in part.inputs], self._packed(part.constants), part.numbers, part.results
                )
                for delivery in part.deliveries:
                    values[delivery.number] = delivery.of(made, self.plan.tape.like)
            else:
                call = self.plan.tape.calls[part]
                args, kwargs = mapped(self._buffer, (call.args, call.kwargs), Tensor)
                _run_call(call._replace(args=args, kwargs=kwargs), values)
        return of_values(lambda v: values[v.number], self.plan.tape.result)

    def _constants(self, part: Program | int) -> list[Tensor]:
        if isinstance(part, Program):
            return part.constants
        call = self.plan.tape.calls[part]
        return list(tensors((call.args, call.kwargs)))

    def _buffer(self, t: Tensor) -> Tensor:
        return self.get_buffer(self.names[id(t)])

    def _packed(self, constants: Sequence[Tensor]) -> list[Tensor]:
        buffers = [self._buffer(t) for t in constants]
        return [t | 0 for t in buffers] if self.copies else buffers  # compilers leave out a clone
