"""The checks that torchvision's and timm's builders share. Each returns the reason why a module is left as it is, or None."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import FusedModule
from ..nn._base import has_hooks


def pair_problem(module: nn.Module, conv: str, norm: str) -> str | None:
    """Whether module.<conv> and module.<norm> are the Conv2d and BatchNorm2d that fused ops understand."""
    convolution, bn = getattr(module, conv, None), getattr(module, norm, None)
    if type(convolution) is not nn.Conv2d:
        return f"{conv} is {type(convolution).__name__}, not Conv2d"
    if convolution.padding_mode != "zeros" or isinstance(convolution.padding, str):
        return f"{conv} pads with {convolution.padding_mode!r}, {convolution.padding!r}"
    if type(bn) is not nn.BatchNorm2d:
        return f"{norm} is {type(bn).__name__}, not BatchNorm2d"
    return hook_problem(module, conv, norm)


def hook_problem(module: nn.Module, *names: str) -> str | None:
    """Whether an inner module has hooks, which would no longer be called."""
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            for inner, found in child.named_modules(prefix=name):
                if has_hooks(found):
                    return f"{inner} has hooks"
    return None


def relu_problem(module: nn.Module, name: str) -> str | None:
    """Whether module.<name> is anything but a ReLU."""
    act = getattr(module, name, None)
    return None if type(act) is nn.ReLU else f"{name} is {type(act).__name__}, not ReLU"


def absent_problem(module: nn.Module, *names: str) -> str | None:
    """Whether an optional part is there, such as squeeze-and-excitation or anti-aliasing, that no fused op computes."""
    for name in names:
        part = getattr(module, name, None)
        if part is not None and not isinstance(part, nn.Identity):
            return f"has {name} ({type(part).__name__})"
    return None


def first(*problems: str | None) -> str | None:
    """The first problem that there is."""
    return next((p for p in problems if p is not None), None)


class ResNetTrunk(FusedModule):
    """The part that torchvision's and timm's ResNet share by the same names: the stem, fused, the pool and the four stages."""

    conv1: nn.Module
    bn1: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def trunk(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> the last stage's features."""
        x = self.maxpool(self.conv_bn(self.conv1, self.bn1, x))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))
