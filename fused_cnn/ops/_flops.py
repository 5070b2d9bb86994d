"""What torch.utils.flop_counter counts for registered ops: those of their convolutions, as it counts PyTorch's own."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from math import prod
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._library import NAMESPACES

COUNTER = "torch.utils.flop_counter"
Formula = TypeVar("Formula", bound=Callable[..., int])
_formulas: dict[str, Callable[..., int]] = {}


def flop_formula(*names: str) -> Callable[[Formula], Formula]:
    """Count a call of these registered ops, on any backend, by a function of its arguments and of `out_val`."""

    def add(formula: Formula) -> Formula:
        for name in names:
            _formulas[name] = formula
            if COUNTER in sys.modules:
                _register(name, formula)
        return formula

    return add


def conv_flops(out: Tensor, weight_shape: Sequence[int]) -> int:
    """A multiply-add for each weight of an output channel at each element of the result, two operations each."""
    return 2 * out.numel() * prod(weight_shape[1:])


def _register(name: str, formula: Callable[..., int]) -> None:
    spaces = [getattr(torch.ops, namespace) for namespace in NAMESPACES.values()]
    packets = [getattr(space, name) for space in spaces if hasattr(space, name)]
    sys.modules[COUNTER].register_flop_formula(packets, get_raw=True)(formula)


class _AtImport(importlib.abc.MetaPathFinder):
    """Registers every formula when the counter is imported, which imports Triton and takes longer than all of this
    package."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                for op, formula in _formulas.items():
                    _register(op, formula)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _AtImport())
