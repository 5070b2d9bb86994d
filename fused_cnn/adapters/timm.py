"""timm's ResNet family. Blocks with squeeze-and-excitation, anti-aliasing, drop-block or drop-path stay as they are."""

from torch import Tensor

from ..nn import BasicBlock, Bottleneck
from ._common import Builder, ResNetTrunk, residual_block

OPTIONAL = ("drop_block", "aa", "se", "drop_path")


class FusedResNet(ResNetTrunk):
    """timm's ResNet with its one-convolution stem fused; mixed into its class, so children and names stay."""

    _stem_act = "act1"
    grad_checkpointing: bool

    def forward_features(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing:
            return super().forward_features(x)  # type: ignore[misc]
        return self.trunk(x)


BLOCKS: dict[str, Builder] = {
    "timm.models.resnet.BasicBlock": residual_block(BasicBlock, "act1", "act2", absent=OPTIONAL),
    "timm.models.resnet.Bottleneck": residual_block(Bottleneck, "act1", "act2", "act3", absent=OPTIONAL),
}
NETWORKS: dict[str, type[ResNetTrunk]] = {"timm.models.resnet.ResNet": FusedResNet}
