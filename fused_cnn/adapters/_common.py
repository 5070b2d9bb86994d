"""What torchvision's and timm's adapters share."""

from torch import Tensor

from ..nn.stem import StemmedNetwork

STAGES = ("layer1", "layer2", "layer3", "layer4")


def full_name(kind: type) -> str:
    """`package.module.Class`."""
    return f"{kind.__module__}.{kind.__qualname__}"


class ResNetTrunk(StemmedNetwork):
    """What torchvision's and timm's ResNet share by name: the stem, which is fused, the pool and the stages."""

    def fused_run_stages(self, x: Tensor) -> Tensor:
        """The pool's result -> the last stage's features."""
        for name in STAGES:
            x = getattr(self, name)(x)
        return x
