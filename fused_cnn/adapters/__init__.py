"""How foreign blocks become fused ones: tables from a class's full name to a builder.

A builder takes the module and the backend and returns the fused module, or a string: the reason why this one is left as it is. Nothing here
imports torchvision or timm; a class is known by its name, so a subclass is never mistaken for its parent.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..nn import FusedModule, MaxPool2d

Builder = Callable[[nn.Module, "str | None"], "FusedModule | str"]


def full_name(module: nn.Module) -> str:
    """The module's class as `package.module.Class`."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _max_pool2d(module: nn.Module, backend: str | None) -> FusedModule | str:
    if module.return_indices:
        return "returns indices"
    return MaxPool2d.from_reference(module, backend=backend)


def tables() -> tuple[dict[str, Builder], dict[str, type[FusedModule]]]:
    """All block builders, and for networks with a stem of their own, the class that runs it fused."""
    from . import timm, torchvision

    shared: dict[str, Builder] = {"torch.nn.modules.pooling.MaxPool2d": _max_pool2d}
    return shared | torchvision.BLOCKS | timm.BLOCKS, torchvision.NETWORKS | timm.NETWORKS
