"""BasicBlock and Bottleneck, ResNet's residual blocks (arXiv 1512.03385, figures 2 and 5), by torchvision's names, and stages of them."""

from __future__ import annotations

from operator import attrgetter
from typing import TypeVar, cast

from torch import Tensor, nn

from ..ops import BatchNormArgs, FoldedConv, PackedResidualStage, bn_add_relu, pack_residual_block, residual_stage
from ..ops._conv import autocast, on_16_bytes, packable
from ._base import FusedModule, Pair, fold, geometry, has_hooks, understood

Block = TypeVar("Block", bound="_Residual")
Projection = tuple[nn.Conv2d, nn.BatchNorm2d]


class _Residual(FusedModule):
    """What both blocks share: the shortcut and the sum that ends them."""

    downsample: nn.Module | None
    residual: bool
    settings = attrgetter("backend", "residual")

    @classmethod
    def from_reference(cls: type[Block], module: nn.Module, *, backend: str | None = None) -> Block:
        """The fused form of torchvision's (or timm's plain) block, over its very children."""
        self = cls.adopt(module, backend=backend, residual=True)
        if "downsample" not in self._modules:  # None, when not registered as a child, is an ordinary attribute
            self.downsample = None
        return self

    def _pairs(self) -> list[Pair]:
        """The block's convolutions with their BatchNorms, in order."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        block = self.packed(x)
        if block is not None:
            return residual_stage(autocast(x)[0], block)
        pairs = self._pairs()
        projection = self._projection() if self.residual else None
        if not self.trains(x, pairs):
            y = x
            for pair in pairs[:-1]:
                y = self.conv_bn(*pair, y)
            return self.conv_bn(*pairs[-1], y, residual=self._shortcut(x, projection) if self.residual else None)
        y, last = self.raw_chain(pairs, x), pairs[-1][1]
        assert isinstance(last, nn.BatchNorm2d)
        if projection is not None and self.trains(x, [projection]):  # both BatchNorms in the pass that adds
            conv, bn = projection
            return bn_add_relu(y, BatchNormArgs.of(last), conv(on_16_bytes(x)), BatchNormArgs.of(bn), backend=self.backend)
        return self.finish(y, last, residual=self._shortcut(x, projection) if self.residual else None)

    def packed(self, x: Tensor) -> PackedResidualStage | None:
        """The whole block for the op that computes it, where it takes inputs such as x."""
        found: PackedResidualStage | None = self.recall("block", x)
        if found is not None:
            return found
        pairs, projection = self._pairs(), self._projection() if self.residual else None
        whole = cast("list[Projection]", pairs if projection is None else [*pairs, projection])
        adds_x = self.residual and projection is None
        if self.backend == "reference" or not self.folds(x, *(m for pair in whole for m in pair)):
            return None
        (like,) = autocast(x[:0])  # empty, of the convolutions' dtype
        if (
            (adds_x and (self.downsample is not None or like.dtype != x.dtype))  # PyTorch promotes the sum
            or not all(understood(conv, bn) for conv, bn in pairs)
            or any(conv.groups != 1 for conv, _ in whole)
            or not packable(like, "conv_bias_relu_fwd", self.backend)
        ):
            return None
        inner = list(self.modules())[1:]  # the block's own hooks are called
        if any(map(has_hooks, inner)):
            return None

        def pack() -> PackedResidualStage | None:
            folded = [FoldedConv(*fold(conv, bn), **geometry(conv)) for conv, bn in whole]
            chain, shortcut = folded[: len(pairs)], folded[-1] if projection else None
            return pack_residual_block(chain, shortcut, shortcut=self.residual, like=like, backend=self.backend)

        return self.remember("block", x, inner, pack)

    def _shortcut(self, x: Tensor, projection: Projection | None) -> Tensor:
        if projection is not None:
            return self.conv_bn(*projection, x, relu=False)
        return x if self.downsample is None else self.downsample(x)

    def _projection(self) -> Projection | None:
        """The shortcut's convolution and BatchNorm, where it is those two and nothing else."""
        layers = list(self.downsample) if type(self.downsample) is nn.Sequential and not has_hooks(self.downsample) else []
        if len(layers) == 2 and isinstance(layers[1], nn.BatchNorm2d) and understood(*layers):
            return layers[0], layers[1]  # type: ignore[return-value]
        return None


class BasicBlock(_Residual):
    """Two 3x3 convolutions and a shortcut: relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)).

    Args:
        inplanes, planes: channels of the input and of the result.
        stride: of the first convolution.
        downsample: the shortcut's projection, or None for the identity.
        residual: False leaves the shortcut out: the plain net's pair of layers (section 4.1).
        backend: "reference", "native", or None for the best at hand.

    Input (N, inplanes, H, W) -> output (N, planes, H / stride, W / stride).
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        *,
        residual: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64 or dilation != 1:
            raise ValueError(
                f"BasicBlock takes groups=1, base_width=64 and dilation=1, got {groups}, {base_width} and {dilation}"
            )
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.residual, self.backend = residual, backend

    def _pairs(self) -> list[Pair]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]


class Bottleneck(_Residual):
    """1x1 reduction, 3x3 (with the stride, as torchvision has it), 1x1 expansion by 4, and a shortcut.

    Args:
        inplanes: channels of the input.
        planes: channels of the 3x3 convolution at base_width=64 and groups=1; the result has 4 * planes.
        stride: of the 3x3 convolution.
        downsample: the shortcut's projection, or None for the identity.
        groups, base_width: of the 3x3 convolution (ResNeXt, arXiv 1611.05431; wide ResNet, arXiv 1605.07146).
        dilation: of the 3x3 convolution.
        residual: False leaves the shortcut out.
        backend: "reference", "native", or None for the best at hand.

    Input (N, inplanes, H, W) -> output (N, 4 * planes, H / stride, W / stride).
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        *,
        residual: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.residual, self.backend = residual, backend

    def _pairs(self) -> list[Pair]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]


class ResidualStage(FusedModule, nn.Sequential):
    """Residual blocks one after the other, as nn.Sequential has them; in eval without gradients they are one op where it takes them all.

    Args:
        blocks: BasicBlock or Bottleneck each.
        backend: "reference", "native", or None for the best at hand.
    """

    def __init__(self, *blocks: nn.Module, backend: str | None = None) -> None:
        super().__init__(*blocks)
        self.backend = backend

    @classmethod
    def from_reference(cls, module: nn.Sequential, *, backend: str | None = None) -> ResidualStage:
        """The same blocks, fused already, as one stage."""
        return cls.adopt(module, backend=backend)

    def to_reference(self) -> nn.Module:
        """The nn.Sequential that it was made from, and in it the blocks that theirs were made from; a stage made here: on plain PyTorch."""
        plain = super().to_reference()
        for name, block in self._modules.items():
            if isinstance(block, FusedModule) and (block._original or not self._original):
                plain._modules[name] = block.to_reference()
        return plain

    def forward(self, x: Tensor) -> Tensor:
        stage = self.recall("stage", x)
        if stage is None:
            stage = self._packed(x)
        return super().forward(x) if stage is None else residual_stage(autocast(x)[0], stage)

    def _packed(self, x: Tensor) -> PackedResidualStage | None:
        stage: PackedResidualStage | None = None
        for block in () if self.backend == "reference" else self:  # a block that occurs twice runs twice
            if type(block) not in (BasicBlock, Bottleneck) or has_hooks(block):  # a subclass has a forward of its own
                return None
            packed = cast(_Residual, block).packed(x)
            if packed is None or (stage is not None and (packed.projects or not packed.shortcut)):
                return None
            stage = packed if stage is None else stage.then(packed)
        return None if stage is None else self.remember("stage", x, list(self.modules())[1:], lambda: stage)
