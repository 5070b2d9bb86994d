"""swap: a foreign block becomes a fused one by its class alone, and back.

The object stays what it is to everybody who holds it, with its attributes, buffers and hooks.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, TypeVar

from torch import nn

from .cache import Owner
from .module import FusedBlock, FusedModule

Self = TypeVar("Self", bound=FusedModule)


def _new_swapped(mixin: type[FusedModule], base: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(swapped_class(mixin, base))


_classes: dict[tuple[type, type], type[FusedModule]] = {}


def swapped_class(mixin: type[FusedModule], base: type[nn.Module]) -> type[FusedModule]:
    """The class that fuse_ gives an instance of `base`: `base` with the mixin's forward, and its name, by which many
    tools know modules. It is made by `base`'s constructor, and pickles by its parents."""
    if (mixin, base) in _classes:
        return _classes[mixin, base]

    def reduce(self: FusedModule, protocol: int) -> tuple[Any, ...]:
        # The state may refer to the object, so it is none of the arguments that the object is made of.
        return _new_swapped, (mixin, base), self.__getstate__()

    @wraps(base.__init__)
    def init(self: FusedModule, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        self.backend, self._fused_owner = None, Owner()

    def fused_plain_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    def name_in_print(self: FusedModule) -> str:
        return f"Fused{base.__name__}"

    body: dict[str, Any] = {
        "__init__": init,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "_get_name": name_in_print,
        "_fused_swapped_from": base,
    }
    if issubclass(mixin, FusedBlock):
        body["fused_plain_forward"] = fused_plain_forward
    made = type(base.__name__, (mixin, base), body)
    return _classes.setdefault((mixin, base), made)


def swap_problem(module: nn.Module) -> str | None:
    """Why `module` cannot be swapped: of the names that fused classes use, users may have this one."""
    return "has an attribute `backend` of its own" if hasattr(module, "backend") else None


def swap(module: nn.Module, mixin: type[Self], backend: str | None) -> Self:
    """`module` itself, from now on of the class that runs it fused."""
    module.__class__ = swapped_class(mixin, type(module))
    module.backend, module._fused_owner = backend, Owner()  # type: ignore[assignment]
    return module  # type: ignore[return-value]


def unswap(module: FusedModule) -> nn.Module:
    """`module` itself, of the class that it had before `swap`."""
    base = type(module)._fused_swapped_from
    assert base is not None
    module.__class__ = base  # type: ignore[assignment]
    for name in ("backend", "_fused_owner"):
        vars(module).pop(name, None)  # nn.Module keeps elsewhere what is a module or a parameter
    return module
