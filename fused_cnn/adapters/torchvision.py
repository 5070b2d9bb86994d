"""torchvision's GoogLeNet, Inception v3 and ResNet families."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import nn as fused
from ..nn import FusedModule
from ..nn.module import Replaced
from ._common import STAGES, ResNetTrunk


class BasicConv2d(fused.ConvBNReLU):
    """GoogLeNet's and Inception v3's BasicConv2d fused."""

    fused_reads = fused.FusedModule.fused_reads
    fused_replaces: ClassVar[Replaced] = {"forward": frozenset(("conv", "bn", "F", "relu"))}


class Inception(fused.Inception):
    """GoogLeNet's Inception block fused."""

    fused_replaces: ClassVar[Replaced] = {
        "forward": frozenset(("_forward", "torch", "cat")),
        "_forward": frozenset(("branch1", "branch2", "branch3", "branch4")),
    }

    def fused_problem(self) -> str | None:
        names = ["branch1", "branch2", "branch3", "branch4"]
        if list(self._modules) != names:
            return f"children are {list(self._modules)}, not {names}"
        return super().fused_problem()


class BasicBlock(fused.BasicBlock):
    """ResNet's BasicBlock fused."""

    fused_replaces: ClassVar[Replaced] = {"forward": frozenset(("conv1", "bn1", "relu", "conv2", "bn2", "downsample"))}


class Bottleneck(fused.Bottleneck):
    """ResNet's Bottleneck fused."""

    fused_replaces: ClassVar[Replaced] = {"forward": BasicBlock.fused_replaces["forward"] | {"conv3", "bn3"}}


class FusedResNet(ResNetTrunk):
    """ResNet with its stem fused."""

    fused_stem_act = "relu"
    avgpool: nn.Module
    fc: nn.Module
    fused_replaces: ClassVar[Replaced] = {
        "_forward_impl": frozenset(("conv1", "bn1", "relu", "maxpool", *STAGES, "avgpool", "torch", "flatten", "fc"))
    }

    def _forward_impl(self, x: Tensor) -> Tensor:
        return self.fused_run(x, super()._forward_impl)  # type: ignore[misc]

    def fused_behind_pool(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(self.fused_run_stages(x)), 1))


BLOCKS: dict[str, type[FusedModule]] = {
    "torchvision.models.googlenet.BasicConv2d": BasicConv2d,
    "torchvision.models.googlenet.Inception": Inception,
    "torchvision.models.inception.BasicConv2d": BasicConv2d,
    "torchvision.models.resnet.BasicBlock": BasicBlock,
    "torchvision.models.resnet.Bottleneck": Bottleneck,
}
NETWORKS: dict[str, type[ResNetTrunk]] = {"torchvision.models.resnet.ResNet": FusedResNet}
