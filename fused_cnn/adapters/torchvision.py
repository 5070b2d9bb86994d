"""torchvision's GoogLeNet, Inception v3 and ResNet families."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import nn as fused
from ..nn import FusedModule
from ..nn.module import Replaced
from ..nn.stem import BlockStemmedNetwork, StemmedNetwork
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


LAYERS = ("conv1", "maxpool1", "conv2", "conv3", "maxpool2", "maxpool3", "maxpool4", "avgpool", "dropout", "fc")
INCEPTIONS = tuple(f"inception{name}" for name in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"))


class FusedGoogLeNet(BlockStemmedNetwork):
    """GoogLeNet with its stem and the pool behind it as one op where a GPU has it."""

    fused_replaces: ClassVar[Replaced] = {
        "_forward": frozenset((*LAYERS, *INCEPTIONS, "aux1", "aux2", "training", "torch", "flatten"))
    }

    def _forward(self, x: Tensor) -> Any:
        return self.fused_run(x, super()._forward)  # type: ignore[misc]

    def fused_behind_pool(self, x: Tensor) -> Any:
        net: Any = self
        x = net.maxpool2(net.conv3(net.conv2(x)))
        x = net.inception4a(net.maxpool3(net.inception3b(net.inception3a(x))))
        aux1 = net.aux1(x) if net.aux1 is not None and self.training else None
        x = net.inception4d(net.inception4c(net.inception4b(x)))
        aux2 = net.aux2(x) if net.aux2 is not None and self.training else None
        x = net.inception5b(net.inception5a(net.maxpool4(net.inception4e(x))))
        return net.fc(net.dropout(torch.flatten(net.avgpool(x), 1))), aux2, aux1


BLOCKS: dict[str, type[FusedModule]] = {
    "torchvision.models.googlenet.BasicConv2d": BasicConv2d,
    "torchvision.models.googlenet.Inception": Inception,
    "torchvision.models.inception.BasicConv2d": BasicConv2d,
    "torchvision.models.resnet.BasicBlock": BasicBlock,
    "torchvision.models.resnet.Bottleneck": Bottleneck,
}
NETWORKS: dict[str, type[StemmedNetwork]] = {"torchvision.models.resnet.ResNet": FusedResNet}
NETWORKS_OF_BLOCKS: dict[str, type[BlockStemmedNetwork]] = {"torchvision.models.googlenet.GoogLeNet": FusedGoogLeNet}
