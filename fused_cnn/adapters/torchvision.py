"""torchvision's GoogLeNet, Inception v3 and ResNet families."""

import torch
from torch import Tensor, nn

from ..nn import BasicBlock, Bottleneck, ConvBNReLU, FusedModule, Inception
from ._common import Builder, ResNetTrunk, full_name, hook_problem, pair_problem, residual_block


def _basic_conv(module: nn.Module, backend: str | None) -> FusedModule | str:
    return pair_problem(module, "conv", "bn") or ConvBNReLU.from_reference(module, backend=backend)


def _inception(module: nn.Module, backend: str | None) -> FusedModule | str:
    names, children = ["branch1", "branch2", "branch3", "branch4"], dict(module.named_children())
    if list(children) != names:
        return f"children are {list(children)}, not {names}"
    problem = hook_problem(module, *names)
    for name, branch in children.items():
        for layer in branch if type(branch) is nn.Sequential else [branch]:
            if type(layer) is nn.MaxPool2d and not layer.return_indices:
                continue
            if full_name(type(layer)) != "torchvision.models.googlenet.BasicConv2d":
                return f"{name} holds {type(layer).__name__}, not BasicConv2d"
            problem = problem or pair_problem(layer, "conv", "bn")
    return problem or Inception.from_reference(module, backend=backend)


class FusedResNet(ResNetTrunk):
    """torchvision's ResNet with its stem fused; mixed into the instance's class, so children and names stay."""

    _stem_act = "relu"
    avgpool: nn.Module
    fc: nn.Module

    def _forward_impl(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(self.trunk(x)), 1))


BLOCKS: dict[str, Builder] = {
    "torchvision.models.googlenet.BasicConv2d": _basic_conv,
    "torchvision.models.googlenet.Inception": _inception,
    "torchvision.models.inception.BasicConv2d": _basic_conv,
    "torchvision.models.resnet.BasicBlock": residual_block(BasicBlock, "relu"),
    "torchvision.models.resnet.Bottleneck": residual_block(Bottleneck, "relu"),
}
NETWORKS: dict[str, type[ResNetTrunk]] = {"torchvision.models.resnet.ResNet": FusedResNet}
