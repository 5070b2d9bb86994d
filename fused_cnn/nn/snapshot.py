"""What modules and tensors were at a moment, and whether they still are: asked at every call of a fused block.

Whoever skips a module's forward must know that nobody would notice. So a snapshot holds all that decides what a module
does: its class, the forward of that class, what its forward reads of it, its hooks and everybody's, its children,
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
COMPUTING = ("forward", "_conv_forward")  # the methods that decide what a module computes, where its class has them

# Everybody's hooks, by PyTorch's own names; an entry in one of them is a hook on every module.
GLOBAL_HOOKS = tuple(
    getattr(nn_module, f"_global_{when}_hooks") for when in ("forward", "forward_pre", "backward", "backward_pre")
)
_CALLS = {name: getattr(nn.Module, name) for name in ("__call__", "_call_impl")}  # tracers replace these for a while
SHARDED = "_is_fsdp_managed_module"  # what fully_shard sets on a module whose parameters it gathers for each call
# What the modules' forward reads of themselves; or what is called in its place, where it is there.
_READS: dict[type, tuple[str, ...]] = {
    nn.Conv2d: (
        *("forward", "_conv_forward", "_parameters", "stride", "padding", "dilation", "groups", "padding_mode"),
        SHARDED,
    ),
    nn.BatchNorm2d: ("forward", "_parameters", "_buffers", "training", "eps"),
    nn.Sequential: ("forward", "_modules"),
}


def hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The tables of what is called when this very module runs."""
    return (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)


def hooks_on_all() -> str | None:
    """Why no module's forward may be skipped, where there are hooks on every module."""
    return "there are hooks on every module" if any(GLOBAL_HOOKS) else None


def watched_by_all() -> str | None:
    """Why no module's forward may be skipped today; None where nobody watches them all."""
    if hooks_on_all():
        return hooks_on_all()
    replaced = [name for name, function in _CALLS.items() if getattr(nn.Module, name) is not function]
    return f"nn.Module.{replaced[0]} was replaced" if replaced else None


class Snapshot:
    """What an owner and the modules whose forward it skips were, and the tensors that it read.

    Args:
        owner: the block; its children and what it reads of itself are compared, its hooks are not: they are called.
        skipped: the modules whose forward the block computes itself.
        methods: methods, by class and name, that must stay what they are.
        tensors: compared by PyTorch's version counter and by address.
    """

    __slots__ = ("_kept", "_positions", "record")

    def __init__(
        self, owner: nn.Module, skipped: Sequence[nn.Module], methods: Iterable[Method], tensors: Sequence[Tensor] = ()
    ) -> None:
        tables: list[dict[Any, Any]] = [*GLOBAL_HOOKS, owner._modules]
        for module in skipped:
            registries: tuple[dict[str, Any], ...] = (module._modules, module._parameters, module._buffers)
            tables += [*hooks(module), *(registry for registry in registries if registry)]
        entries = [(vars(m), name) for m in (owner, *skipped) for name in reads_of(m)]
        values = [[table[name]] if name in table else [] for table, name in entries]
        contents = [list(chain.from_iterable(table.items())) for table in tables]
        called = ((nn.Module, name) for name in _CALLS)
        attributes = [(kind, name, getattr(kind, name)) for kind, name in (*called, *methods)]
        # Alive, so that nothing new gets the address of what was recorded; but for the owner, which holds this.
        self._kept = (list(skipped), tables, values, contents, attributes, list(tensors))
        own = id(vars(owner))
        record = array("q", [len(skipped)])
        record.extend(id(o) for m in skipped for o in (m, type(m)))
        record.append(len(entries))
        for (table, name), value in zip(entries, values, strict=True):
            record.extend((0 if id(table) == own else id(table), id(name), id(value[0]) if value else 0))
        record.append(len(tables))
        for table, content in zip(tables, contents, strict=True):
            record.extend((id(table), len(table), *map(id, content)))
        record.append(len(attributes))
        record.extend(map(id, chain.from_iterable(attributes)))
        record.append(len(tensors))
        record.extend(n for t in tensors for n in (id(t), t._version, t.data_ptr()))
        self.record = record.tobytes()
        self._positions = bytearray(8 * len(entries))  # the native comparison's own

    def holds(self, owner: nn.Module) -> bool:
        """Whether all is as it was."""
        return unchanged(self.record, self._positions, owner.__dict__) if unchanged else self._holds(owner)

    def _holds(self, owner: nn.Module) -> bool:
        """The same without csrc/unchanged.cpp, for interpreters and PyTorch builds in which it cannot be asked."""
        skipped, *_, attributes, tensors = self._kept
        methods = [(kind, name) for kind, name, _ in attributes[len(_CALLS) :]]
        return Snapshot(owner, skipped, methods, tensors).record == self.record


def reads_of(module: nn.Module) -> tuple[str, ...]:
    """The entries of a module's own dictionary that decide what it does. A fused one says so itself."""
    return getattr(type(module), "reads", None) or _READS.get(type(module), ("forward",))


def _native() -> Callable[[bytes, bytearray, dict[str, Any]], bool] | None:
    """The native library's comparison, where it finds its way in this interpreter's objects."""
    if _library.cpu.loaded is None:
        return None
    library = ctypes.PyDLL(str(_library.cpu.file), handle=_library.cpu.loaded._handle)  # keeps the interpreter's lock
    find, function = library.fused_cnn_find, library.fused_cnn_unchanged
    address, size = ctypes.c_void_p, ctypes.c_int64
    find.argtypes, find.restype = (address, address, size, address, address, size), ctypes.c_bool
    function.restype = ctypes.py_object
    tensor, one, two = torch.empty(0), dict.fromkeys("one"), dict.fromkeys("another")
    known = find(id(tensor), tensor._cdata, type(tensor).__basicsize__, id(one), id(two), dict.__basicsize__)
    return function() if known else None


unchanged = _native()
