"""Run a network once without memory, and give each row of its table what its modules did."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .cost import tensors_in
from .layout import Row

if TYPE_CHECKING:
    from torch._ops import OpOverload


@dataclass
class Measured:
    """One row's parameters, multiply-adds, and shapes in and out (None for what did not run)."""

    params: int = 0
    macs: int = 0
    taken: tuple[int, ...] | None = None
    result: tuple[int, ...] | None = None


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy without memory that runs plain PyTorch: nothing is computed, every shape and op is real."""
    stand_in = copy.deepcopy(model).to("meta")
    for module in stand_in.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"  # type: ignore[assignment]
    return stand_in.requires_grad_(True)  # with gradients in sight no weights are folded


class _Meter(TorchDispatchMode):
    """Adds each op's multiply-adds to the row that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[Measured] = []

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        flops = flop_registry.get(func._overloadpacket)
        if flops is not None and self.running:
            self.running[-1].macs += int(flops(*args, **(kwargs or {}), out_val=result)) // 2
        return result


def measure(model: nn.Module, rows: Sequence[Row], input_size: Sequence[int]) -> list[Measured]:
    """Each row's parameters, multiply-adds and shapes, in eval, for an input of `input_size` (N, C, H, W)."""
    stand_in = meta_copy(model).eval()
    meter = _Meter()
    found = []
    for row in rows:
        measured = Measured()
        found.append(measured)
        children = [stand_in.get_submodule(name) for name in row.children]
        measured.params = sum(p.numel() for p in {p for child in children for p in child.parameters()})
        for child in children:
            # A watched child is called as it is, so a ResNet's stem is seen too, which fuses its children.
            _watch(child, measured, meter)
    with meter:
        stand_in(torch.empty(tuple(input_size), device="meta"))
    return found


def _watch(child: nn.Module, row: Measured, meter: _Meter) -> None:
    def before(module: nn.Module, taken: Any) -> None:
        meter.running.append(row)
        row.taken = row.taken or tuple(taken[0].shape)

    def after(module: nn.Module, taken: Any, result: Any) -> None:
        meter.running.pop()
        row.result = next((tuple(t.shape) for t in tensors_in(result)), None)

    child.register_forward_pre_hook(before)
    child.register_forward_hook(after)
