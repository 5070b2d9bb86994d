"""What modules and tensors were at a moment, and whether they still are: asked at every call of a fused block.

Whoever skips a module's forward must know that nobody would notice. So a snapshot holds all that decides what a module
does: its class, the forward of that class, what was set on the module itself, its hooks and everybody's, its children,
parameters and buffers; and of tensors how often PyTorch saw them change, and where they lie.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .. import _library

Method = tuple[type, str]  # a class and the name of one of its methods

# Everybody's hooks, by PyTorch's own names; an entry in one of them is a hook on every module.
GLOBAL_HOOKS = tuple(
    getattr(nn_module, f"_global_{when}_hooks") for when in ("forward", "forward_pre", "backward", "backward_pre")
)
_CALLS: tuple[Method, ...] = ((nn.Module, "__call__"), (nn.Module, "_call_impl"))  # tracers replace these for a while
_State = tuple[Any, ...]


def hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The tables of what is called when this very module runs."""
    return (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)


class Keeper:
    """What a block keeps its snapshots in."""


class Snapshot:
    """What an owner and the modules whose forward it skips were, and the tensors that it read.

    Args:
        owner: the block; its children and its own attributes are compared, its hooks are not: they are called.
        skipped: the modules whose forward the block computes itself.
        methods: methods, by class and name, that must stay what they are.
        tensors: compared by PyTorch's version counter and by address.
    """

    __slots__ = ("_kept", "_state")

    def __init__(
        self, owner: nn.Module, skipped: Sequence[nn.Module], methods: Iterable[Method], tensors: Sequence[Tensor] = ()
    ) -> None:
        tables: list[dict[Any, Any]] = [*GLOBAL_HOOKS, owner._modules]
        for module in skipped:
            registries = (module._modules, module._parameters, module._buffers)
            tables += [vars(module), *hooks(module), *filter(None, registries)]
        entries = [tuple(chain.from_iterable(table.items())) for table in (vars(owner), *tables)]
        # Alive, so that nothing new gets the address of what was recorded; but for what holds this, lest both live on.
        self._kept = [value for entry in entries for value in entry if not isinstance(value, Keeper)]
        self._state: _State = (
            tuple(skipped),
            tuple(map(type, skipped)),
            tuple(tables),
            array("q", [len(entry) // 2 for entry in entries]).tobytes(),
            array("q", map(id, chain.from_iterable(entries))).tobytes(),
            tuple(chain.from_iterable((kind, name, getattr(kind, name)) for kind, name in (*_CALLS, *methods))),
            tuple(tensors),
            array("q", chain.from_iterable((t._version, t.data_ptr()) for t in tensors)).tobytes(),
        )

    def holds(self, owner: nn.Module) -> bool:
        """Whether all is as it was."""
        return unchanged(self._state, vars(owner))


def _unchanged(state: _State, own: dict[str, Any]) -> bool:
    """csrc/unchanged.cpp in Python, for interpreters and PyTorch builds that it does not know."""
    modules, classes, tables, counts, entries, attributes, tensors, states = state
    found = [list(chain.from_iterable(table.items())) for table in (own, *tables)]
    kinds, names, functions = (attributes[i::3] for i in range(3))
    return (
        tuple(map(type, modules)) == classes
        and array("q", [len(entry) // 2 for entry in found]).tobytes() == counts
        and array("q", map(id, chain.from_iterable(found))).tobytes() == entries
        and all(getattr(k, n, None) is f for k, n, f in zip(kinds, names, functions, strict=True))
        and array("q", chain.from_iterable((t._version, t.data_ptr()) for t in tensors)).tobytes() == states
    )


def _fastest() -> Callable[[_State, dict[str, Any]], bool]:
    """The native library's comparison, where it finds its way into this interpreter's tensors."""
    if _library.cpu.loaded is None:
        return _unchanged
    library = ctypes.PyDLL(str(_library.cpu.file), handle=_library.cpu.loaded._handle)  # keeps the interpreter's lock
    tensor = torch.empty(0)
    find, function = library.fused_cnn_find_tensors, library.fused_cnn_unchanged
    find.argtypes, find.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), ctypes.c_bool
    if not find(id(tensor), tensor._cdata, type(tensor).__basicsize__):
        return _unchanged
    function.argtypes, function.restype = (ctypes.py_object, ctypes.py_object), ctypes.c_bool
    return function


unchanged = _fastest()
