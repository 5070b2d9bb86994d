"""How foreign blocks become fused ones: tables from a class's full name to a builder.

A builder takes the module and the backend and returns the fused module, or a string: the reason why this one is left as
it is. Nothing here imports torchvision or timm; a class is known by its name, so a subclass is never mistaken for its
parent. A network with a stem of its own has, instead of a builder, the class that runs it fused.
"""

from torch import nn

from ..nn import FusedModule, MaxPool2d
from . import timm, torchvision
from ._common import Builder, ResNetTrunk


def _max_pool2d(module: nn.Module, backend: str | None) -> FusedModule | str:
    return "returns indices" if module.return_indices else MaxPool2d.from_reference(module, backend=backend)


BLOCKS: dict[str, Builder] = {"torch.nn.modules.pooling.MaxPool2d": _max_pool2d, **torchvision.BLOCKS, **timm.BLOCKS}
NETWORKS: dict[str, type[ResNetTrunk]] = {**torchvision.NETWORKS, **timm.NETWORKS}
