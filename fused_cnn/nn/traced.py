"""Eval-form blocks for graphs that torch.compile, torch.export or make_fx record: one op a block, which takes the very
weights of its modules.

Such a graph outlives its trace: it is run with weights that have been trained on or loaded since, or on another
processor. So what it holds is the block's function of its weights; folding and packing happen behind it, at the first
call, and what they made is kept as long as the weights stay what they are (cache.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .._layout import asks_for_channels_last, empty_nchw, in_channels_last, result_format
from .._library import define_in_python
from ..ops import FoldedConv, conv_bias_relu, inception, pack_conv, pack_residual_block, residual_stage
from ..ops._conv import autocast, empty_result, packable, pair
from ..ops._flops import conv_flops, flop_formula
from ..ops.conv.stage import GEOMETRY, fake_stage, stage_flops
from ..ops.inception.op import OUTPUTS, same_size_flops
from .cache import Owner, detect_stale_weights
from .fold import FoldedInception, FoldedPair, Norm, Pair, Sources, fold_tensors, tensors_of

SIX = 6  # sources of a convolution
_owners = WeakTensorKeyDictionary()  # by the first convolution's weight, with which they go


def _kept(x: Tensor, sources: Sources, settings: Any, make: Callable[[], Any]) -> Any:
    """What `make` makes of the weights, made once; None while they keep changing, or where changes are not counted."""
    given = [t for t in sources if t is not None]
    if any(t.is_inference() for t in given):
        return None
    owner = _owners.setdefault(given[0], Owner())
    kind = (None, x.dtype, x.device)
    waiting = owner.waiting(kind)
    if waiting is not None:
        waiting.note(given[0])
        return None
    form = owner.obtain(kind, given, settings, make)
    form.uses += 1
    if detect_stale_weights.on and form.value is not None:
        form.check(make())
    return form.value


def _units(sources: Sources, eps: Sequence[float]) -> list[tuple[Sources, float]]:
    return [(sources[SIX * i : SIX * (i + 1)], e) for i, e in enumerate(eps)]


def _conv_bn(x: Tensor, six: Sources, eps: float, *where: Any) -> Tensor:
    """bn(conv(x)) in plain PyTorch."""
    weight, bias, gamma, beta, mean, var = six
    y = F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *where)
    return y if var is None else F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps)


def _conv(
    x: Tensor,
    sources: Sources,
    eps: float,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
) -> Tensor:
    def make() -> Any:
        return pack_conv(*fold_tensors(sources, eps), like=x, stride=stride, dilation=dilation, backend="native")

    packed = _kept(x, sources, ("conv", eps, *stride, *dilation), make)
    if packed is None:
        y = _conv_bn(x, sources, eps, stride, padding, dilation)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y
    where: Any = {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation)}
    weight, bias = packed
    return conv_bias_relu(x, weight, bias, residual, **where, relu=relu, backend="native")


def _stage(
    x: Tensor,
    sources: Sources,
    eps: Sequence[float],
    geometry: Sequence[int],
    lengths: Sequence[int],
    shortcut: bool,
    projects: bool,
) -> Tensor:
    units = _units(sources, eps)
    where = [geometry[i + 4 : i + GEOMETRY] for i in range(0, len(geometry), GEOMETRY)]
    pairs: list[Any] = [(tuple(w[:2]), tuple(w[2:4]), tuple(w[4:])) for w in where]  # stride, padding, dilation

    def make() -> Any:
        folded = [FoldedConv(*fold_tensors(six, e), *p) for (six, e), p in zip(units, pairs, strict=True)]
        projection = folded.pop() if projects else None
        stage, first = None, 0
        for length in lengths:
            block = folded[first : first + length]
            packed = pack_residual_block(
                block, None if first else projection, shortcut=bool(first) or shortcut, like=x, backend="native"
            )
            assert packed is not None
            stage, first = packed if stage is None else stage.then(packed), first + length
        return stage

    stage = _kept(x, sources, ("stage", *eps, *geometry, *lengths, shortcut, projects), make)
    if stage is not None:
        return residual_stage(x, stage)
    first = 0
    for block, length in enumerate(lengths):
        y = x
        for i in range(first, first + length):
            y = _conv_bn(y if i == first else F.relu(y), *units[i], *pairs[i])
        if projects and block == 0:
            y = y + _conv_bn(x, *units[-1], *pairs[-1])
        elif shortcut or block > 0:
            y = y + x
        x, first = F.relu(y), first + length
    return x


def _inception(x: Tensor, sources: Sources, eps: Sequence[float]) -> Tensor:
    units = _units(sources, eps)

    def make() -> Any:
        return FoldedInception.of([fold_tensors(six, e) for six, e in units], x, "native")

    packed = _kept(x, sources, ("inception", *eps), make)
    if packed is not None:
        return inception(x, *packed, backend="native")

    def layer(i: int, y: Tensor) -> Tensor:
        six, e = units[i]
        return F.relu(_conv_bn(y, six, e, 1, six[0].size(2) // 2))

    branches = (layer(0, x), layer(2, layer(1, x)), layer(4, layer(3, x)), layer(5, F.max_pool2d(x, 3, 1, 1)))
    return torch.cat(branches, 1).contiguous(memory_format=result_format(x))


define_in_python(
    "folded_conv(Tensor x, Tensor?[] sources, float eps, Tensor? residual, SymInt[] stride, SymInt[] padding, SymInt[] "
    "dilation, bool relu) -> Tensor",
    lambda x, sources, eps, residual, *where: empty_result(x, sources[0].shape, *where[:3]),
    _conv,
)
define_in_python(
    "folded_stage(Tensor x, Tensor?[] sources, float[] eps, SymInt[] geometry, SymInt[] lengths, bool shortcut, bool "
    "projects) -> Tensor",
    lambda x, sources, eps, *where: fake_stage(x, len(eps), *where),
    _stage,
)
define_in_python(
    "folded_inception(Tensor x, Tensor?[] sources, float[] eps) -> Tensor",
    lambda x, sources, eps: empty_nchw(x, sum(sources[SIX * i].size(0) for i in OUTPUTS), *x.shape[2:]),
    _inception,
)
ops = torch.ops.fused_cnn


@flop_formula("folded_conv")
def _conv_flops(x: Tensor, sources: Sources, *rest: Any, out_val: Tensor) -> int:
    return conv_flops(out_val, sources[0].shape)


@flop_formula("folded_stage")
def _stage_flops(x: Tensor, sources: Sources, eps: Sequence[float], *where: Any, out_val: Tensor) -> int:
    return stage_flops(x, (), *where, out_val=out_val)


@flop_formula("folded_inception")
def _inception_flops(x: Tensor, sources: Sources, *rest: Any, out_val: Tensor) -> int:
    return same_size_flops(x, [weight.shape for weight in sources[::SIX]])


def _sources(pairs: Sequence[Pair]) -> tuple[list[Tensor | None], list[float]]:
    sources = chain.from_iterable(tensors_of(*pair) for pair in pairs)
    return list(sources), [0.0 if norm is None else float(norm.eps) for _, norm in pairs]


def _window(conv: nn.Conv2d) -> tuple[Any, Any, Any, Any]:
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation


def traced_conv(
    x: Tensor, conv: nn.Conv2d, norm: Norm, residual: Tensor | None = None, *, relu: bool, backend: str | None
) -> Tensor:
    """relu(bn(conv(x)) + residual); folded in the graph itself where weights need no packing."""
    (x,) = autocast(x)
    residual = None if residual is None else residual.to(x.dtype)
    if conv.groups != 1 or not packable(x, "conv_bias_relu_fwd", backend):
        return FoldedPair.of(conv, norm, x, backend).run(x, residual, relu=relu, backend=backend)
    sources, (eps,) = _sources([(conv, norm)])
    where = (pair(n) for n in _window(conv)[1:])
    if not asks_for_channels_last(conv.weight):
        return ops.folded_conv(x, sources, eps, residual, *where, relu)
    return in_channels_last(ops.folded_conv(in_channels_last(x), sources, eps, residual, *where, relu))


def traced_stage(x: Tensor, blocks: Sequence[Sequence[Pair]], projection: Pair | None, *, shortcut: bool) -> Tensor:
    """Residual blocks one after the other; the first one's shortcut is nothing, its input, or a projection of it."""
    pairs = [*chain.from_iterable(blocks), *([] if projection is None else [projection])]
    sources, eps = _sources(pairs)
    where: list[int] = []
    for conv, _ in pairs:
        where += [conv.in_channels, conv.out_channels, *chain.from_iterable(pair(n) for n in _window(conv))]
    return ops.folded_stage(x, sources, eps, where, list(map(len, blocks)), shortcut, projection is not None)


def traced_inception(x: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """A whole Inception block; the pairs in the order of ops.inception's weights."""
    return ops.folded_inception(x, *_sources(pairs))
