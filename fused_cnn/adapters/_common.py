"""What torchvision's and timm's adapters share: checks, the builder of residual blocks, the ResNet's trunk.

A check returns the reason why a module is left as it is, or None.
"""

from collections.abc import Callable

from torch import Tensor, nn

from ..nn import BasicBlock, Bottleneck, FusedModule
from ..nn.fold import has_hooks

Builder = Callable[[nn.Module, "str | None"], "FusedModule | str"]


def full_name(kind: type) -> str:
    """`package.module.Class`."""
    return f"{kind.__module__}.{kind.__qualname__}"


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
    """Whether an inner module has hooks, which would not be called."""
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


def absent_problem(module: nn.Module, name: str) -> str | None:
    """Whether an optional part is there, such as squeeze-and-excitation or anti-aliasing, that no fused op computes."""
    part = getattr(module, name, None)
    return None if part is None or isinstance(part, nn.Identity) else f"has {name} ({type(part).__name__})"


def residual_block(kind: type[BasicBlock | Bottleneck], *acts: str, absent: tuple[str, ...] = ()) -> Builder:
    """Builds `kind` from a module with conv1, bn1, conv2, ..., ReLUs by the names `acts`, and nothing at `absent`."""

    def build(module: nn.Module, backend: str | None) -> FusedModule | str:
        problems = [absent_problem(module, name) for name in absent]
        problems += [pair_problem(module, f"conv{i}", f"bn{i}") for i in range(1, kind.num_convs + 1)]
        problems += [relu_problem(module, name) for name in acts]
        problems.append(hook_problem(module, *acts, "downsample"))
        return next(filter(None, problems), None) or kind.from_reference(module, backend=backend)

    return build


class ResNetTrunk(FusedModule):
    """What torchvision's and timm's ResNet share by name: the stem, which is fused, the pool and the stages."""

    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d
    _stem_act: str  # the name of the activation behind bn1

    @classmethod
    def problem(cls, module: nn.Module) -> str | None:
        """Why this network's stem is left as it is, or None."""
        act = cls._stem_act
        return pair_problem(module, "conv1", "bn1") or relu_problem(module, act) or hook_problem(module, act)

    def trunk(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> the last stage's features."""
        x = self.conv_bn(self.conv1, self.bn1, x)
        for name in ("maxpool", "layer1", "layer2", "layer3", "layer4"):
            x = getattr(self, name)(x)
        return x
