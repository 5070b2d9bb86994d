"""The owner of folded weights: what a module made of its children's weights, from which sources, checked at each call.

It is never saved. What was folded holds as long as its sources are what they were: which tensors and modules they are,
where the tensors lie and how often PyTorch saw them change, the modules' settings, and that no hook was set on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..ops._conv import autocast_dtype
from .fold import hooks

Self = TypeVar("Self", bound="FoldingModule")
_CONV_SETTINGS = attrgetter("stride", "padding", "dilation", "groups", "padding_mode")
_NORM_SETTINGS = attrgetter("training", "eps")


class FoldingModule(nn.Module):
    """A module that keeps what it folds, each under a name, until its sources change or its mode is set."""

    settings: attrgetter[Any]  # reads what forward depends on beside the children
    _cache: dict[Any, _Folded] | None = None

    def recall(self, name: Any, x: Tensor) -> Any:
        """What `remember` kept under this name, where it still holds for inputs such as x; else None."""
        if self._cache is None or torch.compiler.is_compiling():
            return None
        folded = self._cache.get(name)
        return folded.value if folded is not None and folded.holds(x) else None

    def remember(self, name: Any, x: Tensor, value: Any, sources: Sequence[nn.Module]) -> Any:
        """`value`, kept for inputs such as x until one of `sources` or a setting changes.

        Only for what holds without gradients and hooks: `sources` are all the modules whose forward is skipped.
        """
        tensors = [t for m in sources for t in (*m.parameters(), *m.buffers())]
        if not (torch.compiler.is_compiling() or any(t.is_inference() for t in tensors)):  # whose changes are not seen
            self._cache = self._cache or {}
            self._cache[name] = _Folded(value, x, self, sources)
        return value

    def train(self: Self, mode: bool = True) -> Self:
        self._cache = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_cache"}  # a copy folds again at its first call


class _Folded:
    """A value, and what its sources and the input were when it was made."""

    def __init__(self, value: Any, x: Tensor, owner: FoldingModule, sources: Sequence[nn.Module]) -> None:
        self.value, self.input = value, _kind(x)
        inner = [r for m in sources for r in (m._modules, m._parameters, m._buffers) if r]
        self.registries: list[dict[str, Any]] = [owner._modules, *inner]
        self.members = self._members()
        self.tensors = [t for t in self.members if isinstance(t, Tensor)]
        self.aliases = [t.detach() for t in self.tensors]  # keep the memory, so that no new tensor has an old address
        watched: dict[Callable[[Any], Any], list[Any]] = {
            attrgetter("_version"): self.tensors,
            Tensor.data_ptr: self.tensors,
            _CONV_SETTINGS: [m for m in sources if isinstance(m, nn.Conv2d)],
            _NORM_SETTINGS: [m for m in sources if isinstance(m, nn.BatchNorm2d)],
        }
        for block in (m for m in (owner, *sources) if isinstance(m, FoldingModule)):
            watched.setdefault(block.settings, []).append(block)
        self.states = [(read, objects, list(map(read, objects))) for read, objects in watched.items()]
        self.hooks = [table for m in sources for table in hooks(m)]

    def _members(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self.registries)))

    def holds(self, x: Tensor) -> bool:
        """Asked at every call, so it compares lists in C, not item by item."""
        members = self._members()
        if _kind(x) != self.input or len(members) != len(self.members) or not all(map(is_, members, self.members)):
            return False
        for read, objects, state in self.states:
            if list(map(read, objects)) != state:
                return False
        asks_gradient = torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in self.tensors))
        return not asks_gradient and not any(self.hooks)


def _kind(x: Tensor) -> tuple[Any, ...]:
    """What folded weights depend on in an input."""
    return (autocast_dtype(x), x.dtype, x.device)
