"""ConvBNReLU: relu(bn(conv(x))), the unit of GoogLeNet and Inception v3, by the names of torchvision's BasicConv2d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._layout import asks_for_channels_last, in_channels_last
from ..ops import conv_bias_relu
from ..ops._conv import IntPair, autocast, on_16_bytes
from .fold import FoldedPair, Pair, conv_problem, fold, geometry, norm_problem
from .module import FusedBlock
from .traced import traced_conv


class ConvBNReLU(FusedBlock):
    """relu(bn(conv(x))) as one block. Children: `conv`, and `bn` unless norm=False.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as torch.nn.Conv2d takes them.
        norm: False leaves BatchNorm out (relu(conv(x) + bias)).
        eps: BatchNorm's.
        relu: False leaves the ReLU out.
        backend: "reference", "native", or None for the best at hand.

    Input (N, in_channels, H, W) -> output (N, out_channels, H', W').
    """

    fused_reads = (*FusedBlock.fused_reads, "relu")
    relu: bool

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

    @property
    def fused_norm(self) -> nn.BatchNorm2d | None:
        """The BatchNorm, or None."""
        return self._modules.get("bn")  # type: ignore[return-value]

    def fused_ends_in_relu(self) -> bool:
        """Whether there is one: a foreign block has it always, whatever else its owner calls `relu`."""
        return self._fused_swapped_from is not None or self.relu

    def fused_plain_forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.fused_norm is not None:
            x = self.fused_norm(x)
        return torch.relu(x) if self.relu else x

    def fused_problem(self) -> str | None:
        problem, name = conv_problem(self._modules.get("conv")), "conv"
        if problem is None and "bn" in self._modules:
            problem, name = norm_problem(self.fused_norm), "bn"
        return problem and f"{name} {problem}"

    def fused_pairs(self) -> list[Pair]:
        return [(self.conv, self.fused_norm)]

    def fused_settings(self) -> Any:
        return self.backend, self.fused_ends_in_relu()

    def fused_fold(self, x: Tensor) -> FoldedPair:
        return FoldedPair.of(self.conv, fold(self.conv, self.fused_norm), autocast(x)[0], self.backend)

    def fused_run_folded(self, x: Tensor, folded: FoldedPair) -> Tensor:
        return folded.run(x, relu=self.fused_ends_in_relu(), backend=self.backend)

    def fused_run_traced(self, x: Tensor) -> Tensor:
        return traced_conv(x, self.conv, self.fused_norm, relu=self.fused_ends_in_relu(), backend=self.backend)

    def fused_run_unfolded(self, x: Tensor) -> Tensor:
        if self.fused_norm is not None:
            return self.fused_bn_act(self.conv(on_16_bytes(x)), self.fused_norm, relu=self.fused_ends_in_relu())
        x, weight, bias = autocast(x, self.conv.weight, self.conv.bias)
        x = in_channels_last(x) if asks_for_channels_last(weight) else x
        return conv_bias_relu(
            x, weight, bias, **geometry(self.conv), relu=self.fused_ends_in_relu(), backend=self.backend
        )
