"""timm's ResNet family. Blocks with squeeze-and-excitation, anti-aliasing, drop-block or drop-path stay as they are."""

from typing import ClassVar

from torch import Tensor

from .. import nn as fused
from ..nn import FusedModule
from ..nn.module import Replaced
from ..nn.stem import StemmedNetwork
from ._common import STAGES, ResNetTrunk

CHECKPOINTING = ("grad_checkpointing", "torch", "jit", "is_scripting", "checkpoint_seq")
OPTIONAL = ("drop_block", "aa", "se", "drop_path")


def _uses(*names: str) -> dict[str, frozenset[str]]:
    return {"forward": frozenset((*names, "downsample", *OPTIONAL))}


class BasicBlock(fused.BasicBlock):
    """timm's BasicBlock fused."""

    fused_acts, fused_absent = ("act1", "act2"), OPTIONAL
    fused_reads = (*fused.BasicBlock.fused_reads, *OPTIONAL)
    fused_replaces: ClassVar[Replaced] = _uses("conv1", "bn1", "act1", "conv2", "bn2", "act2")


class Bottleneck(fused.Bottleneck):
    """timm's Bottleneck fused."""

    fused_acts, fused_absent = ("act1", "act2", "act3"), OPTIONAL
    fused_reads = (*fused.Bottleneck.fused_reads, *OPTIONAL)
    fused_replaces: ClassVar[Replaced] = _uses("conv1", "bn1", "act1", "conv2", "bn2", "act2", "conv3", "bn3", "act3")


class FusedResNet(ResNetTrunk):
    """timm's ResNet with its one-convolution stem fused."""

    fused_stem_act = "act1"
    grad_checkpointing: bool
    fused_replaces: ClassVar[Replaced] = {
        "forward_features": frozenset(("conv1", "bn1", "act1", "maxpool", *STAGES, *CHECKPOINTING))
    }

    def forward_features(self, x: Tensor) -> Tensor:
        plain = super().forward_features  # type: ignore[misc]
        return plain(x) if self.grad_checkpointing else self.fused_run(x, plain)

    def fused_behind_pool(self, x: Tensor) -> Tensor:
        return self.fused_run_stages(x)


BLOCKS: dict[str, type[FusedModule]] = {
    "timm.models.resnet.BasicBlock": BasicBlock,
    "timm.models.resnet.Bottleneck": Bottleneck,
}
NETWORKS: dict[str, type[StemmedNetwork]] = {"timm.models.resnet.ResNet": FusedResNet}
