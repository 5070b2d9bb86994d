"""Inception: GoogLeNet's block (arXiv 1409.4842, figure 2), reduced or in the naive form, by torchvision's names."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._candidates import is_recording
from .._layout import asks_for_channels_last, in_channels_last, result_format
from ..ops import BatchNormArgs, PackedInception, bn_relu_concat, concat_bias_relu, inception
from ..ops._conv import autocast, on_16_bytes, packable, pair
from .cache import Form, Kind
from .conv_bn_relu import ConvBNReLU
from .fold import FoldedInception, Pair, fold, geometry, skip_problem
from .max_pool2d import MaxPool2d
from .module import FusedBlock, Understanding, block_problem
from .snapshot import hooks
from .traced import traced_inception


class Inception(FusedBlock):
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

    fused_pays_in_nchw = True  # torch.cat is spared

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

    def fused_plain_forward(self, x: Tensor) -> Tensor:
        return torch.cat(_same_size([branch(x) for branch in self.children()]), 1)

    def fused_problem(self) -> str | None:
        for name, branch in self._modules.items():
            if type(branch) is nn.Sequential:
                problem = skip_problem(branch, nn.Sequential)
                if problem:
                    return f"{name} {problem}"
            problem = _branch_problem(_layers(branch))
            if problem:
                return f"{name} {problem}"
        return None if self._modules else "has no branch"

    def fused_features(self) -> tuple[str, ...]:
        return ("one op",) if _is_one_op(self.fused_branches()) else ()

    def fused_branches(self) -> list[list[Any]]:
        """Each branch's layers in order."""
        return [_layers(branch) for branch in self.children()]

    def fused_pairs(self) -> list[Pair]:
        return [
            (layer.conv, layer.fused_norm)
            for branch in self.fused_branches()
            for layer in branch
            if isinstance(layer, ConvBNReLU)
        ]

    def fused_fold(self, x: Tensor) -> tuple[FoldedInception, bool]:
        folded = [fold(*pair)[:2] for pair in self.fused_pairs()]
        return FoldedInception.of(folded, autocast(x)[0], self.backend), self._fused_gives_channels_last()

    def fused_run_folded(self, x: Tensor, folded: tuple[FoldedInception, bool]) -> Tensor:
        (weights, biases), channels_last = folded
        (x,) = autocast(x)
        x = in_channels_last(x) if channels_last else x
        if isinstance(weights, PackedInception):
            return weights.run(x)
        return inception(x, weights, biases, backend=self.backend)

    def fused_run_traced(self, x: Tensor) -> Tensor:
        if not self.fused_has("one op"):
            return self.fused_plain_forward(x)  # whose convolutions fold, as they do eagerly
        (like,) = autocast(x)
        if is_recording() or packable(like, "inception_fwd", self.backend):
            like = in_channels_last(like) if self._fused_gives_channels_last() else like
            return traced_inception(like, self.fused_pairs(), self.backend)
        return self.fused_run_folded(x, self.fused_fold(x[:0]))

    def _fused_gives_channels_last(self) -> bool:
        """Whether the result is channels_last however x lies: a concatenation is where all the branches are."""
        branches = [[layer.conv.weight for layer in b if isinstance(layer, ConvBNReLU)] for b in self.fused_branches()]
        return all(any(map(asks_for_channels_last, weights)) for weights in branches)

    def _fused_form(self, kind: Kind, x: Tensor, known: Understanding) -> Form | None:
        return super()._fused_form(kind, x, known) if self.fused_has("one op") else None

    def fused_run_unfolded(self, x: Tensor) -> Tensor:
        """Raw convolutions, and BatchNorm or bias, ReLU and the concatenation of each branch's last one in one pass."""
        branches = self.fused_branches()
        lasts = [branch[-1] for branch in branches]
        raw = []
        if any(last.fused_norm is None for last in lasts):
            for *before, last in branches:
                y = on_16_bytes(autocast(_run(before, x))[0])
                raw.append(F.conv2d(y, last.conv.weight.to(y.dtype), **geometry(last.conv)))
            bias = torch.cat([last.conv.bias for last in lasts])
            return concat_bias_relu(_to_concatenate(raw), bias.to(raw[0].dtype), backend=self.backend)
        for branch in branches:
            convs = [(layer.conv, layer.bn) for layer in branch if isinstance(layer, ConvBNReLU)]
            raw.append(
                self.fused_conv_chain(convs, _run(branch[: -len(convs)], x))
            )  # behind the pool, where there is one
        return bn_relu_concat(_to_concatenate(raw), [BatchNormArgs.of(last.bn) for last in lasts], backend=self.backend)


def _layers(branch: nn.Module | None) -> list[Any]:
    return list(branch) if isinstance(branch, nn.Sequential) else [branch]


def _branch_problem(layers: list[Any]) -> str | None:
    """Why a branch is not convolutions with what follows them, behind at most something else in front, with nobody
    watching."""
    first = next((i for i, layer in enumerate(layers) if isinstance(layer, ConvBNReLU)), len(layers))
    if first == len(layers):  # the naive form's pool stands alone
        return f"holds {', '.join(type(layer).__name__ for layer in layers)}, not ConvBNReLU"
    for i, layer in enumerate(layers):
        if i < first:
            problem = "has hooks" if any(hooks(layer)) else None
        elif not isinstance(layer, ConvBNReLU):
            problem = f"is {type(layer).__name__}, not ConvBNReLU"
        else:
            problem = (
                block_problem(layer)
                or layer.fused_known().problem
                or (None if layer.fused_ends_in_relu() else "has no ReLU")
            )
        if problem:
            return f"layer {i} {problem}"
    return None


def _is_one_op(branches: list[list[Any]]) -> bool:
    """Whether the fused op computes exactly these branches: 1x1; 1x1, k x k; 1x1, k x k; 3x3 max pool, 1x1."""
    kinds = [[isinstance(layer, ConvBNReLU) for layer in branch] for branch in branches]
    if kinds != [[True], [True, True], [True, True], [False, True]]:
        return False
    (conv1,), (reduce3, conv3), (reduce5, conv5), (pool, proj) = branches
    pointwise = [layer.conv for layer in (conv1, reduce3, reduce5, proj)]
    return (
        isinstance(pool, MaxPool2d)
        and block_problem(pool, MaxPool2d.forward) is None
        and pool.fused_structure_problem() is None
        and [pair(n) for n in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)] == [(3, 3), *[(1, 1)] * 3]
        and all(conv.kernel_size == (1, 1) for conv in pointwise)
        and all(map(_keeps_size, [*pointwise, conv3.conv, conv5.conv]))
    )


def _keeps_size(conv: nn.Conv2d) -> bool:
    k = conv.kernel_size[0]
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return k % 2 == 1 and shape == ((k, k), (1, 1), (k // 2, k // 2), (1, 1), 1)


def _run(layers: list[Any], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _to_concatenate(branches: list[Tensor]) -> list[Tensor]:
    """The branches, of which the first, by which the fused ops go, lies as torch.cat lays the concatenation."""
    first, *others = _same_size(branches)
    return branches if all(result_format(y) is torch.channels_last for y in others) else [first.contiguous(), *others]


def _same_size(branches: list[Tensor]) -> list[Tensor]:
    sizes = [tuple(b.shape[2:]) for b in branches]
    for i, size in enumerate(sizes):
        if size != sizes[0]:
            raise ValueError(f"Inception: branch{i + 1} gives {size}, but branch1 gives {sizes[0]}: they must agree")
    return branches
