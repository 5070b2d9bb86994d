"""timm's ResNet family. Blocks with squeeze-and-excitation, anti-aliasing, drop-block or drop-path stay as they are."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import BasicBlock, Bottleneck, FusedModule
from . import Builder
from ._common import ResNetTrunk, absent_problem, first, hook_problem, pair_problem, relu_problem

OPTIONAL = ("drop_block", "aa", "se", "drop_path")


def _basic_block(module: nn.Module, backend: str | None) -> FusedModule | str:
    problem = first(
        absent_problem(module, *OPTIONAL),
        pair_problem(module, "conv1", "bn1"),
        pair_problem(module, "conv2", "bn2"),
        relu_problem(module, "act1"),
        relu_problem(module, "act2"),
        hook_problem(module, "act1", "act2", "downsample"),
    )
    return problem or BasicBlock.from_reference(module, backend=backend)


def _bottleneck(module: nn.Module, backend: str | None) -> FusedModule | str:
    problem = first(
        absent_problem(module, *OPTIONAL),
        pair_problem(module, "conv1", "bn1"),
        pair_problem(module, "conv2", "bn2"),
        pair_problem(module, "conv3", "bn3"),
        relu_problem(module, "act1"),
        relu_problem(module, "act2"),
        relu_problem(module, "act3"),
        hook_problem(module, "act1", "act2", "act3", "downsample"),
    )
    return problem or Bottleneck.from_reference(module, backend=backend)


class FusedResNet(ResNetTrunk):
    """timm's ResNet with its one-convolution stem fused; mixed into the instance's class, so that children and names stay."""

    grad_checkpointing: bool

    def forward_features(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing:
            return super().forward_features(x)  # type: ignore[misc]
        return self.trunk(x)

    @staticmethod
    def problem(module: nn.Module) -> str | None:
        """Why this network's stem is left as it is, or None."""
        return first(pair_problem(module, "conv1", "bn1"), relu_problem(module, "act1"), hook_problem(module, "act1"))


BLOCKS: dict[str, Builder] = {
    "timm.models.resnet.BasicBlock": _basic_block,
    "timm.models.resnet.Bottleneck": _bottleneck,
}
NETWORKS: dict[str, type[FusedModule]] = {"timm.models.resnet.ResNet": FusedResNet}
