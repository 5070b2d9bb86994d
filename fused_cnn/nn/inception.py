"""Inception: GoogLeNet's block (arXiv 1409.4842, figure 2), reduced or in the naive form, by torchvision's names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import BatchNormArgs, bn_relu_concat, concat_bias_relu, inception, pack_inception
from ..ops._conv import autocast, on_16_bytes, pair
from .conv_bn_relu import ConvBNReLU
from .fold import can_fold, fold, geometry, has_hooks, is_plain_conv_bn
from .max_pool2d import MaxPool2d
from .module import FusedModule


class Inception(FusedModule):
    """Parallel 1x1, 3x3 and 5x5 convolutions and a max pool, concatenated along the channels.

    In eval without gradients the whole block is one op; in training each branch's last BatchNorm and ReLU write
    straight into the concatenation. Children: `branch1`, `branch2`, `branch3`, `branch4`, as torchvision has them.

    Args:
        in_channels: of the input.
        ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj: the columns of the paper's table 1.
        kernel5: the third branch's kernel: 5 in the paper, 3 in torchvision's weights.
        norm, bias, eps: BatchNorm after each convolution, a bias in it, BatchNorm's eps.
        ceil_mode: of the pool; with stride 1 it changes nothing but the module's description.
        reduce: False makes the naive form (figure 2a): no 1x1 reductions, and the pool is concatenated as it is.
        backend: "reference", "native", or None for the best at hand.

    Input (N, in_channels, H, W) -> output (N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W); in the naive form in_channels
    replaces pool_proj.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch5x5red: int,
        ch5x5: int,
        pool_proj: int,
        *,
        kernel5: int = 3,
        norm: bool = True,
        bias: bool = False,
        eps: float = 0.001,
        ceil_mode: bool = True,
        reduce: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        conv = partial(ConvBNReLU, bias=bias, norm=norm, eps=eps, backend=backend)

        def branch(reduced: int, outputs: int, kernel: int) -> nn.Sequential:
            reduction = [conv(in_channels, reduced, 1)] if reduce else []
            inputs = reduced if reduce else in_channels
            return nn.Sequential(*reduction, conv(inputs, outputs, kernel, padding=kernel // 2))

        self.branch1 = conv(in_channels, ch1x1, 1)
        self.branch2 = branch(ch3x3red, ch3x3, 3)
        self.branch3 = branch(ch5x5red, ch5x5, kernel5)
        self.branch4 = nn.Sequential(MaxPool2d(3, 1, 1, ceil_mode=ceil_mode, backend=backend))
        if reduce:
            self.branch4.append(conv(in_channels, pool_proj, 1))
        self.backend = backend

    @classmethod
    def from_reference(cls, module: nn.Module, *, backend: str | None = None) -> Inception:
        """The fused form of torchvision's Inception block; its BasicConv2d children are fused too."""

        def fuse(layer: nn.Module) -> nn.Module:
            kind = MaxPool2d if isinstance(layer, nn.MaxPool2d) else ConvBNReLU
            return kind.from_reference(layer, backend=backend)

        self = cls.adopt(module, backend=backend)
        self._modules.update({name: _convert(branch, fuse) for name, branch in module.named_children()})
        return self

    def to_reference(self) -> nn.Module:
        """The unfused block, down to its convolutions."""

        def unfuse(layer: nn.Module) -> nn.Module:
            return layer.to_reference() if isinstance(layer, FusedModule) else layer

        plain = super().to_reference()
        plain._modules.update({name: branch and _convert(branch, unfuse) for name, branch in self._modules.items()})
        return plain

    def forward(self, x: Tensor) -> Tensor:
        packed = self.recall("block", x)
        if packed is not None:  # eval: the whole block is one op
            return inception(autocast(x)[0], *packed, backend=self.backend)
        children = list(self.children())
        branches = [list(c) if isinstance(c, nn.Sequential) else [c] for c in children]
        if self.backend == "reference" or any(map(has_hooks, children)) or not all(map(_is_plain, branches)):
            return torch.cat(_same_size([child(x) for child in children]), 1)
        convs = [(layer.conv, layer.norm) for branch in branches for layer in branch if isinstance(layer, ConvBNReLU)]
        if not _is_one_op(branches) or not can_fold(x, convs):
            return self._forward_train(x, branches)
        folded = [fold(*pair) for pair in convs]
        biases = [f.weight.new_zeros(f.weight.size(0)) if f.bias is None else f.bias for f in folded]
        (like,) = autocast(x[:0])
        packed = pack_inception([f.weight for f in folded], biases, like=like, backend=self.backend)
        self.remember("block", x, packed, list(self.modules())[1:])
        return inception(autocast(x)[0], *packed, backend=self.backend)

    def _forward_train(self, x: Tensor, branches: list[list[Any]]) -> Tensor:
        """Raw convolutions, and BatchNorm or bias, ReLU and the concatenation of each branch's last one in one pass."""
        lasts = [branch[-1] for branch in branches]
        raw = []
        if any(last.norm is None for last in lasts):
            for *before, last in branches:
                y = on_16_bytes(autocast(_run(before, x))[0])
                raw.append(F.conv2d(y, last.conv.weight.to(y.dtype), **geometry(last.conv)))
            bias = torch.cat([last.conv.bias for last in lasts])
            return concat_bias_relu(_same_size(raw), bias.to(raw[0].dtype), backend=self.backend)
        for branch in branches:
            convs = [(layer.conv, layer.bn) for layer in branch if isinstance(layer, ConvBNReLU)]
            raw.append(self.conv_chain(convs, _run(branch[: -len(convs)], x)))  # behind the pool, where there is one
        return bn_relu_concat(_same_size(raw), [BatchNormArgs.of(last.bn) for last in lasts], backend=self.backend)


def _is_plain(branch: list[Any]) -> bool:
    """Whether a branch ends in what ConvBNReLU means, after at most something else in front, with nobody watching."""
    first = next((i for i, layer in enumerate(branch) if isinstance(layer, ConvBNReLU)), len(branch))
    return (
        first < len(branch)  # the naive form's pool stands alone
        and not any(map(has_hooks, branch))
        and all(isinstance(u, ConvBNReLU) and u.relu and is_plain_conv_bn(u.conv, u.norm) for u in branch[first:])
    )


def _is_one_op(branches: list[list[Any]]) -> bool:
    """Whether the fused op computes exactly these branches: 1x1; 1x1, k x k; 1x1, k x k; 3x3 max pool, 1x1."""
    kinds = [[isinstance(layer, ConvBNReLU) for layer in branch] for branch in branches]
    if kinds != [[True], [True, True], [True, True], [False, True]]:
        return False
    (conv1,), (reduce3, conv3), (reduce5, conv5), (pool, proj) = branches
    pointwise = [layer.conv for layer in (conv1, reduce3, reduce5, proj)]
    return (
        isinstance(pool, MaxPool2d)
        and [pair(n) for n in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)] == [(3, 3), *[(1, 1)] * 3]
        and all(conv.kernel_size == (1, 1) for conv in pointwise)
        and all(map(_keeps_size, [*pointwise, conv3.conv, conv5.conv]))
    )


def _keeps_size(conv: nn.Conv2d) -> bool:
    k = conv.kernel_size[0]
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return k % 2 == 1 and shape == ((k, k), (1, 1), (k // 2, k // 2), (1, 1), 1)


def _convert(branch: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A branch with its layers converted; a sequence of them keeps its own training flag."""
    if not isinstance(branch, nn.Sequential):
        return convert(branch)
    made = nn.Sequential(*map(convert, branch))
    made.training = branch.training
    return made


def _run(layers: list[Any], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _same_size(branches: list[Tensor]) -> list[Tensor]:
    sizes = [tuple(b.shape[2:]) for b in branches]
    for i, size in enumerate(sizes):
        if size != sizes[0]:
            raise ValueError(f"Inception: branch{i + 1} gives {size}, but branch1 gives {sizes[0]}: they must agree")
    return branches
