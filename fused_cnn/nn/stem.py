"""StemmedNetwork: a network whose first convolution, BatchNorm and ReLU sit at its top level, as ResNet's do."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops._conv import autocast, on_16_bytes
from .fold import FoldedPair, Pair, fold, pair_problem, skip_problem
from .module import FusedModule
from .traced import traced_conv


class StemmedNetwork(FusedModule):
    """A network that runs relu(bn1(conv1(x))) fused. Its forward calls `fused_run`, and that `fused_behind_stem`."""

    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d
    fused_stem_act: str = "relu"  # the name of the activation behind bn1

    def fused_behind_stem(self, x: Tensor) -> Tensor:
        """What the network does with the stem's result."""
        raise NotImplementedError

    def fused_problem(self) -> str | None:
        children, act = self._modules, self.fused_stem_act
        problem = skip_problem(children.get(act), nn.ReLU)
        names = ("conv1", "bn1")
        return pair_problem(children.get("conv1"), children.get("bn1"), names) or (problem and f"{act} {problem}")

    def fused_skipped(self) -> list[nn.Module]:
        found = [self._modules.get(name) for name in ("conv1", "bn1", self.fused_stem_act)]
        return [m for m in found if m is not None]

    def fused_pairs(self) -> list[Pair]:
        return [(self.conv1, self.bn1)]

    def fused_fold(self, x: Tensor) -> FoldedPair:
        return FoldedPair.of(self.conv1, fold(self.conv1, self.bn1), autocast(x)[0], self.backend)

    def fused_run_folded(self, x: Tensor, folded: FoldedPair) -> Tensor:
        return self.fused_behind_stem(folded.run(x, relu=True, backend=self.backend))

    def fused_run_traced(self, x: Tensor) -> Tensor:
        return self.fused_behind_stem(traced_conv(x, self.conv1, self.bn1, relu=True, backend=self.backend))

    def fused_run_unfolded(self, x: Tensor) -> Tensor:
        return self.fused_behind_stem(self.fused_bn_act(self.conv1(on_16_bytes(x)), self.bn1))
