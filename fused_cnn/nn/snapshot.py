"""What modules and tensors were at a moment, and whether they still are: asked at every call of a fused block.

Whoever skips a module's forward must know that nobody would notice. So a snapshot holds all that decides what a module
does: its class, the forward of that class and what it calls, what it reads of its module, what would be found in the
place of that, the hooks on it and on everybody, its children, parameters and buffers; and of tensors how often PyTorch
saw them change, where and how they lie, and on a CPU the first eight bytes there, which show most changes that PyTorch
does not see.
"""

from __future__ import annotations

import ctypes
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .. import _library

Method = tuple[type, str]  # a class and the name of one of its methods
COMPUTING = ("forward", "_conv_forward")  # the methods that decide what a module computes, where its class has them
CALLS = ("__call__", "_call_impl")  # and those that lead there
_CALLS = {name: getattr(nn.Module, name) for name in CALLS}  # tracers replace these for a while
LIBRARY = {"torch": torch, "F": F}  # as methods call them
# What the forward of the modules that blocks skip calls, and what that calls.
_FUNCTIONS = [
    *((F, name, getattr(F, name)) for name in ("conv2d", "batch_norm", "relu", "max_pool2d")),
    *((torch, name, getattr(torch, name)) for name in ("batch_norm", "relu", "relu_", "max_pool2d", "cat")),
]
ADDING: Method = (Tensor, "__iadd__")
_ADD = Tensor.__iadd__
SHARDED = "_is_fsdp_managed_module"  # what fully_shard sets on a module whose parameters it gathers for each call
_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HOOKS = (*_FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")
# What the modules' forward reads of themselves; or what is called in its place, where it is there.
_READS: dict[type, tuple[str, ...]] = {
    nn.Conv2d: (
        *("forward", "_conv_forward", "_parameters", "weight", "bias"),
        *("stride", "padding", "dilation", "groups", "padding_mode", SHARDED),
    ),
    nn.BatchNorm2d: (
        *("forward", "_parameters", "_buffers", "weight", "bias", "running_mean", "running_var", "training", "eps"),
    ),
    nn.Sequential: ("forward", "_modules"),
}


def hooks(module: nn.Module, names: Sequence[str] = _HOOKS) -> tuple[dict[int, Any], ...]:
    """The tables of what is called when this very module runs."""
    return tuple(getattr(module, name) for name in names)


def _global(names: Sequence[str]) -> list[str]:
    """PyTorch's tables of what is called for every module, by the very strings under which it holds them."""
    return [sys.intern(f"_global{name}") for name in names]


def _hooks_on_all(names: Sequence[str] = _HOOKS) -> list[dict[int, Any]]:
    return [getattr(nn_module, name) for name in _global(names)]


def replaced_for_all() -> str | None:
    """Why no module's forward may be skipped, in a recorded graph either; None where nothing was replaced."""
    if any(_hooks_on_all()):
        return "there are hooks on every module"
    for module, name, function in _FUNCTIONS:
        if getattr(module, name) is not function:
            return f"{module.__name__}.{name} was replaced"
    return None if Tensor.__iadd__ is _ADD else "torch.Tensor.__iadd__ was replaced"


def watched_by_all() -> str | None:
    """Why no module's forward may be skipped today; None where nobody watches them all."""
    problem = replaced_for_all()
    if problem:
        return problem
    changed = [name for name, function in _CALLS.items() if getattr(nn.Module, name) is not function]
    return f"nn.Module.{changed[0]} was replaced" if changed else None


def call_problem(kind: type[nn.Module]) -> str | None:
    """Why a call of such a module does not lead to its forward as it does for every other."""
    changed = [name for name in CALLS if getattr(kind, name) is not getattr(nn.Module, name)]
    return f"is of a class whose {changed[0]} was replaced" if changed else None


class Snapshot:
    """What an owner and the modules whose forward it skips were, and the tensors that it read.

    Args:
        owner: the block; its children and what it reads of itself are compared, its hooks are not: they are called.
        skipped: the modules whose forward the block computes itself.
        methods: methods, by class and name, that must stay what they are.
        tensors: compared as `states_of` sees them.
        gradients: False for what runs without gradients alone, where PyTorch calls no backward hook: none is looked at.
    """

    __slots__ = ("_kept", "_positions", "record")

    def __init__(
        self,
        owner: nn.Module,
        skipped: Sequence[nn.Module],
        methods: Iterable[Method],
        tensors: Sequence[Tensor] = (),
        *,
        gradients: bool = True,
    ) -> None:
        names = _HOOKS if gradients else _FORWARD_HOOKS
        tables: list[dict[Any, Any]] = [*_hooks_on_all(names), owner._modules]
        entries = [(vars(nn_module), name) for name in _global(names)]
        entries += [(vars(module), name) for module, name, _ in _FUNCTIONS]
        methods = list(methods)
        entries += {(id(scope), name): (scope, name) for m in methods for scope, name in _libraries_of(*m)}.values()
        entries += [(vars(m), name) for m in (owner, *skipped) for name in reads_of(m)]
        for module in skipped:
            registries: tuple[dict[str, Any], ...] = (module._modules, module._parameters, module._buffers)
            tables += [*hooks(module, names), *(registry for registry in registries if registry)]
            entries += [(vars(module), name) for name in names]
        present = [(table, name, table[name]) for table, name in entries if name in table]
        absent = [(table, name) for table, name in entries if name not in table]
        contents = [list(chain.from_iterable(table.items())) for table in tables]
        attributes = [(kind, name, getattr(kind, name)) for kind, name in methods]
        own = vars(owner)
        # Alive, so that nothing new gets the address of what was recorded; but for the owner, which holds this.
        holders = [table for table, _ in entries if table is not own], [value for *_, value in present]
        held = (t for m in skipped for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
        objects = [*skipped, *held]
        self._kept = (list(skipped), objects, tables, holders, contents, gradients, attributes, list(tensors))
        record = [len(objects)]
        for each in objects:
            record += (id(each), id(type(each)))
        record.append(len(present))
        for table, name, value in present:
            record += (0 if table is own else id(table), id(name), id(value))
        record.append(len(absent))
        for table, name in absent:
            record += (0 if table is own else id(table), id(name))
        record.append(len(tables))
        for table, content in zip(tables, contents, strict=True):
            record += (id(table), len(table), *map(id, content))
        record.append(len(attributes))
        record += map(id, chain.from_iterable(attributes))
        record.append(len(tensors))
        self.record = array("q", record).tobytes() + states_of(tensors)
        self._positions = bytearray(8 * len(present))  # the native comparison's own

    def holds(self, owner: nn.Module) -> bool:
        """Whether all is as it was."""
        return unchanged(self.record, self._positions, owner.__dict__) if unchanged else self._holds(owner)

    def _holds(self, owner: nn.Module) -> bool:
        """The same without csrc/unchanged.cpp, for interpreters and PyTorch builds in which it cannot be asked."""
        skipped, *_, gradients, attributes, tensors = self._kept
        methods = [(kind, name) for kind, name, _ in attributes]
        return Snapshot(owner, skipped, methods, tensors, gradients=gradients).record == self.record


def reads_of(module: nn.Module) -> list[str]:
    """The entries of a module's own dictionary that decide what it does, and those that would stand in the place of a
    child or of a method that is skipped. A fused one says itself what it reads."""
    kind = type(module)
    reads = getattr(kind, "fused_reads", None) or _READS.get(kind, ("forward",))
    return list(dict.fromkeys(("_call_impl", *reads, *getattr(kind, "fused_replaces", ()), *module._modules)))


def _libraries_of(kind: type, method: str) -> list[tuple[dict[str, Any], str]]:
    """Where a method finds what it calls torch and F."""
    scope = getattr(getattr(kind, method), "__globals__", {})
    return [(scope, name) for name in LIBRARY if name in scope]


def states_of(tensors: Sequence[Tensor]) -> bytes:
    """Of each tensor: which it is, how often PyTorch saw it change, its address, how it lies there, and the first word
    of its memory."""
    return states(tuple(tensors)) if states else array("q", chain.from_iterable(map(_state, tensors))).tobytes()


def _state(t: Tensor) -> tuple[int, ...]:
    address = t.data_ptr()
    is_readable = t.is_cpu and address != 0 and t.numel() >= 8
    first = ctypes.c_int64.from_address(address).value if is_readable else 0
    return id(t), -1 if t.is_inference() else t._version, address, hash((t.shape, t.stride())), is_readable, first


def _native() -> tuple[Callable[[bytes, bytearray, dict[str, Any]], bool] | None, Callable[[Any], bytes] | None]:
    """The native library's comparison and states, where it finds its way in this interpreter's objects."""
    if _library.cpu.loaded is None:
        return None, None
    library = ctypes.PyDLL(str(_library.cpu.file), handle=_library.cpu.loaded._handle)  # keeps the interpreter's lock
    find, function = library.fused_cnn_find, library.fused_cnn_python_function
    address, size = ctypes.c_void_p, ctypes.c_int64
    find.argtypes, find.restype = (address, address, size, address, address, size), ctypes.c_bool
    function.restype = ctypes.py_object
    tensor, one, two = torch.empty(0), dict.fromkeys("one"), dict.fromkeys("another")
    if not find(id(tensor), tensor._cdata, type(tensor).__basicsize__, id(one), id(two), dict.__basicsize__):
        return None, None
    return function(0), function(1)


unchanged, states = _native()
