"""ResNet's residual blocks (arXiv 1512.03385, figures 2 and 5) by torchvision's names, and stages of them."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, TypeVar

from torch import Tensor, nn

from ..ops import BatchNormArgs, PackedResidualStage, bn_add_relu, pack_residual_block, residual_stage
from ..ops._conv import autocast, on_16_bytes, packable
from .fold import ConvBN, can_fold, fold, has_hooks, is_plain_conv_bn
from .module import FusedModule

Block = TypeVar("Block", bound="_Residual")


class _Residual(FusedModule):
    """What both blocks share: their arguments, and forward in eval and in training."""

    num_convs: int
    settings = attrgetter("backend", "residual")

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
        self._add_layers(inplanes, planes, stride, groups, base_width, dilation)
        self.downsample = downsample
        self.residual, self.backend = residual, backend

    def _add_layers(self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int) -> None:
        raise NotImplementedError

    @classmethod
    def from_reference(cls: type[Block], module: nn.Module, *, backend: str | None = None) -> Block:
        """The fused form of torchvision's (or timm's plain) block, over its very children."""
        self = cls.adopt(module, backend=backend, residual=True)
        if "downsample" not in self._modules:  # None, when not registered as a child, is an ordinary attribute
            self.downsample = None
        return self

    def forward(self, x: Tensor) -> Tensor:
        block = self.packed(x)
        if block is not None:  # eval: the whole block is one op
            return residual_stage(autocast(x)[0], block)
        convs, projection = self._convs(), self._projection()
        plain = all(bn is not None and is_plain_conv_bn(conv, bn) for conv, bn in convs)
        if self.backend != "reference" and plain and not can_fold(x, convs):
            return self._forward_train(x, convs, projection)
        y = x  # eval, conv by conv
        for conv, bn in convs[:-1]:
            y = self.conv_bn(conv, bn, y)
        return self.conv_bn(*convs[-1], y, residual=self._shortcut(x, projection))

    def packed(self, x: Tensor) -> PackedResidualStage | None:
        """The whole block, folded and packed for the op that computes it; None where that op cannot run it on x."""
        block = self.recall("block", x)
        if block is not None:
            return block
        convs, projection = self._convs(), self._projection()
        pairs = convs if projection is None else [*convs, projection]
        if self.backend == "reference" or not can_fold(x, pairs):
            return None
        (like,) = autocast(x[:0])  # empty, of the convolutions' dtype
        adds_x = self.residual and projection is None
        inner = list(self.modules())[1:]  # the block's own hooks are called
        if (
            (adds_x and (self.downsample is not None or like.dtype != x.dtype))  # PyTorch promotes the sum
            or not all(is_plain_conv_bn(*pair) for pair in convs)
            or any(conv.groups != 1 for conv, _ in pairs)
            or not packable(like, "conv_bias_relu_fwd", self.backend)
            or any(map(has_hooks, inner))
        ):
            return None
        folded = [fold(*pair) for pair in convs]
        projected = None if projection is None else fold(*projection)
        block = pack_residual_block(folded, projected, shortcut=self.residual, like=like, backend=self.backend)
        return self.remember("block", x, block, inner)

    def _forward_train(self, x: Tensor, convs: list[ConvBN], projection: ConvBN | None) -> Tensor:
        """Raw convolutions, BatchNorm and ReLU fused between them, and the last BatchNorm with the sum and its ReLU."""
        y, last = self.conv_chain(convs, x), convs[-1][1]
        if projection is not None and not can_fold(x, [projection]):  # both BatchNorms in the pass that adds
            conv, bn = projection
            shortcut = conv(on_16_bytes(x))
            return bn_add_relu(y, BatchNormArgs.of(last), shortcut, BatchNormArgs.of(bn), backend=self.backend)
        return self.bn_act(y, last, residual=self._shortcut(x, projection))

    def _shortcut(self, x: Tensor, projection: ConvBN | None) -> Tensor | None:
        """What is added: x, its projection, what else `downsample` makes of it, or nothing."""
        if projection is not None:
            return self.conv_bn(*projection, x, relu=False)
        if not self.residual:
            return None
        return x if self.downsample is None else self.downsample(x)

    def _projection(self) -> ConvBN | None:
        """The shortcut's convolution and BatchNorm, where it is those two and nothing else."""
        if not self.residual or type(self.downsample) is not nn.Sequential or has_hooks(self.downsample):
            return None
        layers: Any = tuple(self.downsample)
        is_pair = len(layers) == 2 and isinstance(layers[1], nn.BatchNorm2d) and is_plain_conv_bn(*layers)
        return layers if is_pair else None

    def _convs(self) -> list[ConvBN]:
        """conv1 and bn1, conv2 and bn2, ..."""
        children: Any = self._modules
        return [(children[f"conv{i}"], children[f"bn{i}"]) for i in range(1, self.num_convs + 1)]


class BasicBlock(_Residual):
    """Two 3x3 convolutions and a shortcut: relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)).

    Args:
        inplanes, planes: channels of the input and of the result.
        stride: of the first convolution.
        downsample: the shortcut's projection, or None for the identity.
        groups, base_width, dilation: must be 1, 64 and 1.
        residual: False leaves the shortcut out: the plain net's pair of layers (section 4.1).
        backend: "reference", "native", or None for the best at hand.

    Input (N, inplanes, H, W) -> output (N, planes, H / stride, W / stride).
    """

    num_convs, expansion = 2, 1

    def _add_layers(self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int) -> None:
        if (groups, base_width, dilation) != (1, 64, 1):
            got = f"{groups}, {base_width} and {dilation}"
            raise ValueError(f"BasicBlock takes groups=1, base_width=64 and dilation=1, got {got}")
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)


class Bottleneck(_Residual):
    """1x1 reduction, 3x3 (with the stride, as torchvision has it), 1x1 expansion by 4, and a shortcut.

    Args:
        inplanes: channels of the input.
        planes: channels of the 3x3 convolution at base_width=64 and groups=1; the result has 4 * planes.
        stride, dilation: of the 3x3 convolution.
        downsample: the shortcut's projection, or None for the identity.
        groups, base_width: of the 3x3 convolution (ResNeXt, arXiv 1611.05431; wide ResNet, arXiv 1605.07146).
        residual: False leaves the shortcut out.
        backend: "reference", "native", or None for the best at hand.

    Input (N, inplanes, H, W) -> output (N, 4 * planes, H / stride, W / stride).
    """

    num_convs, expansion = 3, 4

    def _add_layers(self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int) -> None:
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)


class ResidualStage(FusedModule, nn.Sequential):
    """Residual blocks one after the other, as nn.Sequential has them; in eval without gradients one op where possible.

    Args:
        blocks: BasicBlock or Bottleneck each.
        backend: "reference", "native", or None for the best at hand.
    """

    def __init__(self, *blocks: nn.Module, backend: str | None = None) -> None:
        super().__init__(*blocks)
        self.backend = backend

    @classmethod
    def from_reference(cls, module: nn.Module, *, backend: str | None = None) -> ResidualStage:
        """An nn.Sequential's blocks, fused already, as one stage."""
        return cls.adopt(module, backend=backend)

    def to_reference(self) -> nn.Module:
        """The nn.Sequential that it was made from, over the blocks that its own were made from; else a plain stage."""
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
        """All blocks in one, where each is packed and adds its own input (the first one's shortcut is free)."""
        blocks: list[Any] = list(self)  # a block that occurs twice runs twice
        stage: PackedResidualStage | None = None
        if self.backend == "reference" or any(type(b) not in (BasicBlock, Bottleneck) or has_hooks(b) for b in blocks):
            return None  # a subclass has a forward of its own
        for block in blocks:
            packed = block.packed(x)
            if packed is None or (stage is not None and (packed.projects or not packed.shortcut)):
                return None
            stage = packed if stage is None else stage.then(packed)
        return None if stage is None else self.remember("stage", x, stage, list(self.modules())[1:])
