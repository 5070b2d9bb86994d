"""ConvBNReLU: relu(bn(conv(x))), the unit of GoogLeNet and Inception v3, by the names of torchvision's BasicConv2d."""

from __future__ import annotations

from operator import attrgetter

from torch import Tensor, nn

from ..ops._conv import IntPair
from .module import FusedModule


class ConvBNReLU(FusedModule):
    """relu(bn(conv(x))) as one block. Children: `conv`, and `bn` unless norm=False.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as torch.nn.Conv2d takes them.
        norm: False leaves BatchNorm out (relu(conv(x) + bias)).
        eps: BatchNorm's.
        relu: False leaves the ReLU out.
        backend: "reference", "native", or None for the best at hand.

    Input (N, in_channels, H, W) -> output (N, out_channels, H', W').
    """

    settings = attrgetter("backend", "relu")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        *,
        stride: IntPair = 1,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        eps: float = 1e-5,
        relu: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        if norm:
            self.bn = nn.BatchNorm2d(out_channels, eps=eps)
        self.relu, self.backend = relu, backend

    @classmethod
    def from_reference(cls, module: nn.Module, *, backend: str | None = None) -> ConvBNReLU:
        """The fused form of a module whose children are `conv` and `bn` and whose forward is relu(bn(conv(x)))."""
        return cls.adopt(module, backend=backend, relu=True)

    @property
    def norm(self) -> nn.BatchNorm2d | None:
        """The BatchNorm, or None."""
        return self._modules.get("bn")  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_bn(self.conv, self.norm, x, relu=self.relu)
