"""torchvision's GoogLeNet, Inception v3 and ResNet families."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn import BasicBlock, Bottleneck, ConvBNReLU, FusedModule, Inception
from . import Builder, full_name
from ._common import ResNetTrunk, first, hook_problem, pair_problem, relu_problem


def _basic_conv(module: nn.Module, backend: str | None) -> FusedModule | str:
    return pair_problem(module, "conv", "bn") or ConvBNReLU.from_reference(module, backend=backend)


def _inception(module: nn.Module, backend: str | None) -> FusedModule | str:
    names = ("branch1", "branch2", "branch3", "branch4")
    if [n for n, _ in module.named_children()] != list(names):
        return f"children are {[n for n, _ in module.named_children()]}, not {list(names)}"
    problem = hook_problem(module, *names)
    for name in names:
        branch = getattr(module, name)
        for layer in branch if type(branch) is nn.Sequential else [branch]:
            if type(layer) is nn.MaxPool2d and not layer.return_indices:
                continue
            if full_name(layer) != "torchvision.models.googlenet.BasicConv2d":
                return f"{name} holds {type(layer).__name__}, not BasicConv2d"
            problem = problem or pair_problem(layer, "conv", "bn")
    return problem or Inception.from_reference(module, backend=backend)


def _basic_block(module: nn.Module, backend: str | None) -> FusedModule | str:
    problem = first(
        pair_problem(module, "conv1", "bn1"),
        pair_problem(module, "conv2", "bn2"),
        relu_problem(module, "relu"),
        hook_problem(module, "relu", "downsample"),
    )
    return problem or BasicBlock.from_reference(module, backend=backend)


def _bottleneck(module: nn.Module, backend: str | None) -> FusedModule | str:
    problem = first(
        pair_problem(module, "conv1", "bn1"),
        pair_problem(module, "conv2", "bn2"),
        pair_problem(module, "conv3", "bn3"),
        relu_problem(module, "relu"),
        hook_problem(module, "relu", "downsample"),
    )
    return problem or Bottleneck.from_reference(module, backend=backend)


class FusedResNet(ResNetTrunk):
    """torchvision's ResNet with its stem fused; mixed into the instance's class, so that children and names stay."""

    avgpool: nn.Module
    fc: nn.Module

    def _forward_impl(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(self.trunk(x)), 1))

    @staticmethod
    def problem(module: nn.Module) -> str | None:
        """Why this network's stem is left as it is, or None."""
        return first(pair_problem(module, "conv1", "bn1"), relu_problem(module, "relu"), hook_problem(module, "relu"))


BLOCKS: dict[str, Builder] = {
    "torchvision.models.googlenet.BasicConv2d": _basic_conv,
    "torchvision.models.googlenet.Inception": _inception,
    "torchvision.models.inception.BasicConv2d": _basic_conv,
    "torchvision.models.resnet.BasicBlock": _basic_block,
    "torchvision.models.resnet.Bottleneck": _bottleneck,
}
NETWORKS: dict[str, type[FusedModule]] = {"torchvision.models.resnet.ResNet": FusedResNet}
