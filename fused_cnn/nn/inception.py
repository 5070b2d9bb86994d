"""Inception: GoogLeNet's block (arXiv 1409.4842, figure 2), with the 1x1 reductions or in the naive form, by torchvision's names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import (
    BatchNormArgs,
    bn_relu_concat,
    concat_bias_relu,
    inception,
    pack_inception,
)
from ..ops._conv import autocast, on_16_bytes, pair
from ._base import FusedModule, fold, has_hooks, understood
from .conv_bn_relu import ConvBNReLU
from .max_pool2d import MaxPool2d

Unit = tuple[nn.Conv2d, nn.BatchNorm2d | None]


class Inception(FusedModule):
    """Parallel 1x1, 3x3 and 5x5 convolutions and a max pool, concatenated along the channels.

    In eval without gradients the whole block is one op; in training each branch's last BatchNorm and ReLU write straight into the
    concatenation. Children: `branch1`, `branch2`, `branch3`, `branch4`, as torchvision has them.

    Args:
        in_channels: of the input.
        ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj: the columns of the paper's table 1.
        kernel5: the third branch's kernel: 5 in the paper, 3 in torchvision's weights.
        norm, bias, eps: BatchNorm after each convolution, a bias in it, BatchNorm's eps.
        ceil_mode: of the pool; with stride 1 it changes nothing but the module's description.
        reduce: False makes the naive form (figure 2a): no 1x1 reductions, and the pool is concatenated as it is.
        backend: "reference", "native", or None for the best at hand.

    Input (N, in_channels, H, W) -> output (N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W); in the naive form in_channels replaces pool_proj.
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

        def conv(inputs: int, outputs: int, kernel: int) -> ConvBNReLU:
            return ConvBNReLU(
                inputs, outputs, kernel, padding=kernel // 2, bias=bias, norm=norm, eps=eps, backend=backend
            )

        def branch(reduced: int, outputs: int, kernel: int) -> nn.Sequential:
            if not reduce:
                return nn.Sequential(conv(in_channels, outputs, kernel))
            return nn.Sequential(conv(in_channels, reduced, 1), conv(reduced, outputs, kernel))

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
        self = cls.adopt(module, backend=backend)
        for name, branch in module.named_children():
            if isinstance(branch, nn.Sequential):
                kinds = (MaxPool2d if isinstance(layer, nn.MaxPool2d) else ConvBNReLU for layer in branch)
                layers = [kind.from_reference(layer, backend=backend) for kind, layer in zip(kinds, branch, strict=True)]
                self._modules[name] = _sequential(layers, branch.training)
            else:
                self._modules[name] = ConvBNReLU.from_reference(branch, backend=backend)
        return self

    def to_reference(self) -> nn.Module:
        """The unfused block, down to its convolutions."""
        plain = super().to_reference()
        for name, branch in list(self._modules.items()):
            if isinstance(branch, nn.Sequential):
                layers = [layer.to_reference() if isinstance(layer, FusedModule) else layer for layer in branch]
                plain._modules[name] = _sequential(layers, branch.training)
            elif isinstance(branch, FusedModule):
                plain._modules[name] = branch.to_reference()
        return plain

    def _paths(self) -> list[list[Any]]:
        return [list(b) if isinstance(b, nn.Sequential) else [b] for b in self.children()]

    def forward(self, x: Tensor) -> Tensor:
        packed = self.recall("block", x)
        if packed is not None:
            return inception(autocast(x)[0], *packed, backend=self.backend)
        paths = self._paths()
        if self.backend == "reference" or any(map(has_hooks, self.children())) or not all(map(_fusable, paths)):
            return self._concatenate([branch(x) for branch in self.children()])
        units: list[Any] = [(layer.conv, layer.norm) for path in paths for layer in path if isinstance(layer, ConvBNReLU)]
        if _is_whole_block(paths) and self.folds(x, *(m for unit in units for m in unit)):
            packed = self.remember("block", x, list(self.modules())[1:], lambda: self._pack(units, x))
            return inception(autocast(x)[0], *packed, backend=self.backend)
        return self._train(x)

    def _pack(self, units: list[Unit], x: Tensor) -> Any:
        (like,) = autocast(x[:0])
        folded = [fold(*unit) for unit in units]
        biases = [w.new_zeros(w.size(0)) if b is None else b for w, b in folded]
        return pack_inception([w for w, _ in folded], biases, like=like, backend=self.backend)

    @staticmethod
    def _run(path: list[Any], x: Tensor) -> Tensor:
        for layer in path:
            x = layer(x)
        return x

    @staticmethod
    def _check_sizes(branches: list[Tensor]) -> None:
        sizes = [tuple(b.shape[2:]) for b in branches]
        for i, size in enumerate(sizes):
            if size != sizes[0]:
                raise ValueError(f"Inception: branch{i + 1} gives {size}, but branch1 gives {sizes[0]}: they must agree")

    def _concatenate(self, branches: list[Tensor]) -> Tensor:
        self._check_sizes(branches)
        return torch.cat(branches, 1)

    def _train(self, x: Tensor) -> Tensor:
        """Every branch up to its last convolution, then normalisation, ReLU and the concatenation in one pass."""
        paths = self._paths()
        if not all(isinstance(path[-1], ConvBNReLU) for path in paths):  # the naive form's pool
            return self._concatenate([self._run(path, x) for path in paths])
        lasts = [path[-1] for path in paths]
        norms = [last.norm for last in lasts]
        if any(norm is None for norm in norms):
            raw = [_without_bias(last.conv, self._run(path[:-1], x)) for path, last in zip(paths, lasts, strict=True)]
            self._check_sizes(raw)
            bias = torch.cat([last.conv.bias for last in lasts])
            return concat_bias_relu(raw, bias.to(raw[0].dtype), backend=self.backend)
        raw = []
        for path in paths:
            units = [layer for layer in path if isinstance(layer, ConvBNReLU)]
            y = self._run(path[: -len(units)], x)  # the pool, where there is one
            raw.append(self.raw_chain([(unit.conv, unit.norm) for unit in units], y))
        self._check_sizes(raw)
        return bn_relu_concat(raw, [BatchNormArgs.of(n) for n in norms], backend=self.backend)


def _fusable(path: list[Any]) -> bool:
    """Whether a branch is what ConvBNReLU means, after at most something else in front, with nobody watching."""
    first = next((i for i, layer in enumerate(path) if isinstance(layer, ConvBNReLU)), len(path))
    return not any(map(has_hooks, path)) and all(
        isinstance(layer, ConvBNReLU) and layer.relu and understood(layer.conv, layer.norm) for layer in path[first:]
    )


def _is_whole_block(paths: list[list[Any]]) -> bool:
    """Whether the branches are exactly those that the fused op computes: 1x1; 1x1, k x k; 1x1, k x k; 3x3 max pool, 1x1."""

    def same_padded(layer: Any, pointwise: bool) -> bool:
        conv = layer.conv
        k = conv.kernel_size[0]
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        return geometry == ((k, k), (1, 1), (k // 2, k // 2), (1, 1), 1) and k % 2 == 1 and (k == 1 or not pointwise)

    if [[isinstance(layer, ConvBNReLU) for layer in path] for path in paths] != [[True], [True] * 2, [True] * 2, [False, True]]:
        return False
    (c1,), (r3, c3), (r5, c5), (pool, proj) = paths
    if not isinstance(pool, MaxPool2d) or not (all(same_padded(c, True) for c in (c1, r3, r5, proj)) and same_padded(c3, False)):
        return False
    window = (pair(pool.kernel_size), pair(pool.stride), pair(pool.padding), pair(pool.dilation))
    return same_padded(c5, False) and window == ((3, 3), (1, 1), (1, 1), (1, 1))


def _sequential(layers: list[Any], training: bool) -> nn.Sequential:
    made = nn.Sequential(*layers)
    made.training = training  # the container's own flag; the layers keep theirs
    return made


def _without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution alone; its bias is added in the pass that concatenates."""
    x = on_16_bytes(autocast(x)[0])
    return F.conv2d(x, conv.weight.to(x.dtype), None, conv.stride, conv.padding, conv.dilation, conv.groups)
