"""How foreign modules become fused ones: tables from a class's full name to the class that runs its instances fused.

Such a class says which of the foreign class's methods it replaces and what those may use, so that another version of
the library, or a method that somebody put in their place, is noticed. Nothing here imports torchvision or timm; a class
is known by its name, so a subclass is never mistaken for its parent.
"""

from typing import ClassVar

from .. import nn as fused
from ..nn import FusedModule
from ..nn.module import Replaced
from ..nn.stem import BlockStemmedNetwork, StemmedNetwork
from . import timm, torchvision


class MaxPool2d(fused.MaxPool2d):
    """nn.MaxPool2d fused."""

    fused_replaces: ClassVar[Replaced] = {
        "forward": frozenset(("F", "max_pool2d", *fused.max_pool2d.WINDOW, "return_indices"))
    }


BLOCKS: dict[str, type[FusedModule]] = {
    "torch.nn.modules.pooling.MaxPool2d": MaxPool2d,
    **torchvision.BLOCKS,
    **timm.BLOCKS,
}
NETWORKS: dict[str, type[StemmedNetwork]] = {**torchvision.NETWORKS, **timm.NETWORKS}
NETWORKS_OF_BLOCKS: dict[str, type[BlockStemmedNetwork]] = torchvision.NETWORKS_OF_BLOCKS  # swapped behind their blocks
