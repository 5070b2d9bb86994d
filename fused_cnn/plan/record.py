"""Recording: what a network's operators do on one input, as a list of calls that can be made again on others.

A recording sees what PyTorch dispatches, so it knows nothing of branches that Python took by a shape or a setting, and
belongs to inputs of that shape. Where a call reads values on the host, or writes into a tensor that is not the
recording's own, it could not be made again: that is said, and the network runs as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from .._trees import mapped, tensors

if TYPE_CHECKING:
    from torch._ops import OpOverload


_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class NotRecordable(RuntimeError):
    """A network does what cannot be recorded; the message says what."""


class Value(NamedTuple):
    """An activation, by its number."""

    number: int


def of_values(function: Callable[[Value], Any], tree: Any) -> Any:
    """`tree` with function(v) in place of every Value."""
    return mapped(function, tree, Value)


def values_in(tree: Any) -> list[int]:
    found: list[int] = []
    of_values(lambda v: found.append(v.number), tree)
    return found


class Call(NamedTuple):
    """A call of an operator; `args` and `kwargs` have a Value for each activation, and constants as they are."""

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: Any  # Values, in the operator's structure

    @property
    def name(self) -> str:
        return self.op._schema.name


class Tape(NamedTuple):
    """A recording: `inputs` values come from outside, `like` has a tensor without memory for each value's shape, and
    `derived` are the calls that made constants of constants, with what they made."""

    inputs: int
    like: list[Tensor]
    calls: list[Call]
    derived: list[tuple[Call, list[Tensor]]]
    result: Any

    def is_of_values(self) -> bool:
        """Whether the result is tensors of activations alone, in whatever containers."""
        return not any(isinstance(leaf, (Tensor, int, float, str)) for leaf in _leaves(self.result))

    def derive_again(self) -> None:
        """Make the derived constants again, in their places, of what they are made of now."""
        for call, made in self.derived:
            again = call.op(*call.args, **call.kwargs)
            for to, t in zip(made, tensors(again), strict=True):
                if to is not t:
                    to.copy_(t)


def record(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Tape:
    """What `function(*inputs)` does.

    Raises:
        NotRecordable: it does what cannot be done again on other inputs.
    """
    recorder = _Recorder(inputs)
    with recorder:
        out = function(*inputs)
    _check_result(out)
    return Tape(len(inputs), recorder.like, recorder.calls, recorder.derived, mapped(recorder.placed, out, Tensor))


def _takes_places(op: OpOverload, args: Sequence[Any]) -> bool:
    """Whether it is x[places], of which only a mask's number depends on values."""
    return op._schema.name == "aten::index" and not any(t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1]))


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if not isinstance(tree, (list, tuple)) or isinstance(tree, Value):
        yield tree
    else:
        for item in tree:
            yield from _leaves(item)


def _check_result(out: Any) -> None:
    """In a container that nobody here knows, a tensor would be missed, and returned for ever."""
    if type(out) in (dict, OrderedDict):
        _check_result(list(out.values()))
    elif isinstance(out, (list, tuple)):
        for item in out:
            _check_result(item)
    elif not (out is None or isinstance(out, (Tensor, int, float, str))):
        raise NotRecordable(f"it returns a {type(out).__name__}")


def _arguments(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    declared = op._schema.arguments
    by_name = {a.name: a for a in declared}
    return [*zip(declared, args, strict=False), *((by_name[name], value) for name, value in kwargs.items())]


def _is_written(declared: Any) -> bool:
    return declared.alias_info is not None and declared.alias_info.is_write


def is_view(op: OpOverload) -> bool:
    """Whether the results are other descriptions of an argument's memory, and nothing is written."""
    returns = op._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class _Recorder(TorchDispatchMode):
    sees_fused_ops = True  # blocks run fused under it

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.numbers = WeakTensorKeyDictionary()
        self.made = WeakTensorKeyDictionary()  # constants made of constants
        self.roots: list[int] = []  # by value, the one whose memory it shows
        self.like: list[Tensor] = []
        self.calls: list[Call] = []
        self.derived: list[tuple[Call, list[Tensor]]] = []
        self.inputs = len(inputs)
        for x in inputs:
            self.number(x)

    def number(self, t: Tensor, root: int | None = None) -> Value:
        found = self.numbers.get(t)
        if found is None:
            found = self.numbers[t] = len(self.like)
            self.roots.append(found if root is None else root)
            self.like.append(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"))
        return Value(found)

    def placed(self, t: Tensor) -> Any:
        found = self.numbers.get(t)
        return t if found is None else Value(found)

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("profiler", "prim"):
            return func(*args, **kwargs)
        placed_args, placed_kwargs = mapped(self.placed, (tuple(args), kwargs), Tensor)
        values = values_in((placed_args, placed_kwargs))
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if _HOST & set(func.tags) and not _takes_places(func, args):  # of constants, too, which refresh changes
            raise NotRecordable(f"{func} gives the host a value, or a shape that depends on values")
        if values or is_random:
            self._check(func, placed_args, placed_kwargs)
        result = func(*args, **kwargs)
        if values or is_random:
            root = self.roots[values[0]] if values and is_view(func) else None
            results = mapped(lambda t: self.number(t, root), result, Tensor)
            self.calls.append(Call(func, placed_args, placed_kwargs, results))
            if any(t.shape != self.like[self.numbers[t]].shape for t in tensors(result)):
                raise NotRecordable(f"{func} changes the shape of an activation in place")
            return result
        for argument, value in _arguments(func, args, kwargs):
            if _is_written(argument) and not all(t in self.made for t in tensors(value)):
                raise NotRecordable(f"{func} changes a parameter or buffer")
        found = list(tensors(result))
        given = list(tensors((args, kwargs)))
        for t in found:
            if not is_view(func) or all(g in self.made for g in given):  # a view of a buffer is the buffer's
                self.made[t] = True
        if not is_view(func):
            self.derived.append((Call(func, tuple(args), kwargs, None), found))
        return result

    def _check(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for argument, value in _arguments(func, args, kwargs):
            if not _is_written(argument):
                continue
            if next(tensors(value), None) is not None:
                raise NotRecordable(f"{func} writes an activation into a parameter, a buffer or a constant")
            if torch.Tag.inplace_view not in func.tags and any(self.roots[n] < self.inputs for n in values_in(value)):
                raise NotRecordable(f"{func} changes an input")
