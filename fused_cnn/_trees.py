"""The arguments of a call, whose tensors lie in tuples, lists, dicts and named tuples: every one of them, and the same
with others."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor of `value`, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def leaves_of(value: Any) -> list[Tensor]:
    """Those of `value`'s tensors that require grad: what a backward pass is for."""
    return [t for t in tensors(value) if t.requires_grad]


def mapped(function: Callable[[Any], Any], value: Any, kind: type) -> Any:
    """`value` with function(v) in place of every v of a kind."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (list, tuple)):
        items = [mapped(function, item, kind) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return type(value)((key, mapped(function, item, kind)) for key, item in value.items())
    return value
