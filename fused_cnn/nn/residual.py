"""BasicBlock and Bottleneck, ResNet's residual blocks (arXiv 1512.03385, figures 2 and 5), by torchvision's names."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from ..ops import BatchNormArgs, bn_add_relu
from ._base import FusedModule, understood

Block = TypeVar("Block", bound="_Residual")


class _Residual(FusedModule):
    """What both blocks share: the shortcut and the sum that ends them."""

    downsample: nn.Module | None
    residual: bool

    @classmethod
    def from_reference(cls: type[Block], module: nn.Module, *, backend: str | None = None) -> Block:
        """The fused form of torchvision's (or timm's plain) block, over its very children."""
        self = cls.adopt(module, backend=backend, residual=True)
        if "downsample" not in self._modules:  # None, when not registered as a child, is an ordinary attribute
            self.downsample = None
        return self

    def _last(self, conv: nn.Module, bn: nn.Module, y: Tensor, x: Tensor) -> Tensor:
        """relu(bn(conv(y)) + shortcut(x)); in training a projection's BatchNorm is applied in the same pass as the sum."""
        if not self.residual:
            return self.conv_bn(conv, bn, y)
        projection = self._projection()
        if projection is None:
            shortcut = x if self.downsample is None else self.downsample(x)
            return self.conv_bn(conv, bn, y, residual=shortcut)
        shortcut_conv, shortcut_bn = projection
        if (
            self.backend == "reference"
            or not understood(conv, bn)
            or self.folds(x, conv, bn, shortcut_conv, shortcut_bn)
        ):
            return self.conv_bn(conv, bn, y, residual=self.conv_bn(shortcut_conv, shortcut_bn, x, relu=False))
        assert isinstance(bn, nn.BatchNorm2d)
        return bn_add_relu(
            conv(y), BatchNormArgs.of(bn), shortcut_conv(x), BatchNormArgs.of(shortcut_bn), backend=self.backend
        )

    def _projection(self) -> tuple[nn.Conv2d, nn.BatchNorm2d] | None:
        """The shortcut's convolution and BatchNorm, where it is those two and nothing else."""
        layers = list(self.downsample) if type(self.downsample) is nn.Sequential else []
        if len(layers) == 2 and understood(*layers) and isinstance(layers[1], nn.BatchNorm2d):
            return layers[0], layers[1]  # type: ignore[return-value]
        return None


class BasicBlock(_Residual):
    """Two 3x3 convolutions and a shortcut: relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)).

    Args:
        inplanes, planes: channels of the input and of the result.
        stride: of the first convolution.
        downsample: the shortcut's projection, or None for the identity.
        residual: False leaves the shortcut out: the plain net's pair of layers (section 4.1).
        backend: "reference", "native", "triton", or None for the best at hand.

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

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_bn(self.conv1, self.bn1, x)
        return self._last(self.conv2, self.bn2, y, x)


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
        backend: "reference", "native", "triton", or None for the best at hand.

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

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_bn(self.conv1, self.bn1, x)
        y = self.conv_bn(self.conv2, self.bn2, y)
        return self._last(self.conv3, self.bn3, y, x)
