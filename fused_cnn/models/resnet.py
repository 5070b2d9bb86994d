"""The residual and plain networks of arXiv 1512.03385, and torchvision's wide and grouped ones.

`ResNet` has torchvision's parameter names (conv1, bn1, layer1.0.conv1, ..., fc), so state dicts load as they
are. Three things are options because the paper compares them: the shortcut (A, B or C), no shortcut at all,
and where a bottleneck takes its stride.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import BasicBlock, Bottleneck, MaxPool2d, ResidualStage
from ..nn.stem import StemmedNetwork

Shortcut = Literal["A", "B", "C"]


class ZeroPadShortcut(nn.Module):
    """Shortcut option A (arXiv 1512.03385, section 3.3): every stride-th pixel, zeros in the added channels.

    (N, C, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)), a new tensor.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(f"ZeroPadShortcut: cannot go from {in_channels} down to {out_channels} channels")
        self.extra = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class ResNet(StemmedNetwork):
    """A residual (or plain) network (arXiv 1512.03385).

    Args:
        block: BasicBlock or Bottleneck.
        layers: blocks in each stage.
        num_classes: length of the logits.
        planes: channels of each stage, before the block's expansion.
        small_images: the CIFAR stem of section 4.2: a 3x3 convolution with stride 1, and no max pool.
        shortcut: where dimensions change: "A" pads with zeros, "B" projects; "C" projects in every block.
        residual: False leaves every shortcut out: the plain network.
        stride_in_1x1: a Bottleneck's first 1x1 takes the stride, as in the paper; else its 3x3.
        zero_init_residual: the last BatchNorm of each block starts at zero (arXiv 1706.02677).
        groups, width_per_group: ResNeXt's and the wide networks' bottleneck widths.
        replace_stride_with_dilation: for stages 2, 3 and 4: dilate instead of striding.
        backend: "reference" (plain eager PyTorch), "native", or None for the best at hand.

    Input (N, 3, H, W); output logits (N, num_classes).
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        planes: Sequence[int] = (64, 128, 256, 512),
        small_images: bool = False,
        shortcut: Shortcut = "B",
        residual: bool = True,
        stride_in_1x1: bool = False,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B", "C"):
            raise ValueError(f'shortcut must be "A", "B" or "C", got {shortcut!r}')
        dilate = [False, *(replace_stride_with_dilation or [False] * (len(layers) - 1))]
        if len(dilate) != len(layers):
            raise ValueError(
                f"replace_stride_with_dilation must have {len(layers) - 1} elements, got {len(dilate) - 1}"
            )
        if stride_in_1x1 and block is not Bottleneck:
            raise ValueError("stride_in_1x1 moves a Bottleneck's stride; a BasicBlock has no 1x1 convolution")
        self.backend = backend
        self.shortcut, self.residual, self.stride_in_1x1 = shortcut, residual, stride_in_1x1
        self._block_options = {"groups": groups, "base_width": width_per_group}

        self.inplanes = planes[0]
        self.dilation = 1
        kernel, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else MaxPool2d(3, stride=2, padding=1, backend=backend)
        self.stages = [f"layer{i + 1}" for i in range(len(layers))]
        for i, (name, width, blocks) in enumerate(zip(self.stages, planes, layers, strict=True)):
            setattr(self, name, self._stage(block, width, blocks, 1 if i == 0 else 2, dilate[i]))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes[-1] * block.expansion, num_classes)
        self._init_weights(zero_init_residual)

    def _stage(
        self, block: type[BasicBlock | Bottleneck], planes: int, blocks: int, stride: int, dilate: bool
    ) -> ResidualStage:
        before = self.dilation
        if dilate:
            self.dilation, stride = self.dilation * stride, 1
        stage = ResidualStage(backend=self.backend)
        for i in range(blocks):
            made = block(
                self.inplanes,
                planes,
                stride if i == 0 else 1,
                self._downsample(planes * block.expansion, stride if i == 0 else 1),
                dilation=before if i == 0 else self.dilation,
                residual=self.residual,
                backend=self.backend,
                **self._block_options,
            )
            if self.stride_in_1x1:
                made.conv1.stride, made.conv2.stride = made.conv2.stride, made.conv1.stride
            stage.append(made)
            self.inplanes = planes * block.expansion
        return stage

    def _downsample(self, out_channels: int, stride: int) -> nn.Module | None:
        changes = stride != 1 or self.inplanes != out_channels
        if not self.residual or not (changes or self.shortcut == "C"):
            return None
        if self.shortcut == "A":
            return ZeroPadShortcut(self.inplanes, out_channels, stride)
        return nn.Sequential(
            nn.Conv2d(self.inplanes, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
        )

    def _init_weights(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fused_run(x, self.fused_plain_forward)

    def fused_plain_forward(self, x: Tensor) -> Tensor:
        """Every child is called."""
        return self.fused_behind_stem(self.relu(self.bn1(self.conv1(x))))

    def fused_behind_pool(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(**options: Any) -> ResNet:
    """ResNet-18: 2, 2, 2, 2 basic blocks."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options: Any) -> ResNet:
    """ResNet-34: 3, 4, 6, 3 basic blocks."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options: Any) -> ResNet:
    """ResNet-50: 3, 4, 6, 3 bottlenecks, the stride in the 3x3 (torchvision's, "v1.5")."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def resnet101(**options: Any) -> ResNet:
    """ResNet-101: 3, 4, 23, 3 bottlenecks, the stride in the 3x3."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


def resnet152(**options: Any) -> ResNet:
    """ResNet-152: 3, 8, 36, 3 bottlenecks, the stride in the 3x3."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)


def resnet50_paper(**options: Any) -> ResNet:
    """ResNet-50 as arXiv 1512.03385 counts it: the stride in the first 1x1. Same parameters as `resnet50`."""
    return resnet50(stride_in_1x1=True, **options)


def resnet101_paper(**options: Any) -> ResNet:
    """ResNet-101 with the stride in the first 1x1, as arXiv 1512.03385 counts it."""
    return resnet101(stride_in_1x1=True, **options)


def resnet152_paper(**options: Any) -> ResNet:
    """ResNet-152 with the stride in the first 1x1, as arXiv 1512.03385 counts it."""
    return resnet152(stride_in_1x1=True, **options)


def wide_resnet50_2(**options: Any) -> ResNet:
    """ResNet-50 with bottlenecks twice as wide (arXiv 1605.07146)."""
    return resnet50(width_per_group=128, **options)


def resnext50_32x4d(**options: Any) -> ResNet:
    """ResNet-50 with 32 groups of 4 channels in its 3x3 convolutions (arXiv 1611.05431)."""
    return resnet50(groups=32, width_per_group=4, **options)


def plain18(**options: Any) -> ResNet:
    """ResNet-18 without its shortcuts: the plain network of section 3.3."""
    return resnet18(residual=False, **options)


def plain34(**options: Any) -> ResNet:
    """ResNet-34 without its shortcuts, which trains worse than plain18: the degradation of section 4.1."""
    return resnet34(residual=False, **options)


def resnet_cifar(depth: int, **options: Any) -> ResNet:
    """The CIFAR network of depth 6n + 2 (section 4.2): three stages of n basic blocks, option A.

    The stages have 16, 32 and 64 channels. Input (N, 3, 32, 32); `num_classes` is 10 unless given;
    `residual=False` makes the plain network.

    Raises:
        ValueError: the depth is not 6n + 2.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"a CIFAR network's depth is 6n + 2 (20, 32, 44, 56, 110), got {depth}")
    settings: dict[str, Any] = {"num_classes": 10, "shortcut": "A", **options}
    return ResNet(BasicBlock, [(depth - 2) // 6] * 3, planes=(16, 32, 64), small_images=True, **settings)
