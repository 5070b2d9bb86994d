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

from .._candidates import is_recording, transforms_active
from .._layout import asks_for_channels_last, empty_nchw, in_channels_last, in_result_format
from .._library import define_in_python
from ..ops import (
    FoldedConv,
    PackedResidualStage,
    conv_bias_relu,
    inception,
    pack_conv,
    pack_residual_block,
    residual_stage,
)
from ..ops._conv import autocast, autocast_dtype, empty_result, packable, pair
from ..ops._flops import conv_flops, flop_formula
from ..ops.conv.stage import GEOMETRY, fake_stage, stage_flops
from ..ops.inception.op import OUTPUTS, same_size_flops
from .cache import Owner, detect_stale_weights
from .fold import FoldedInception, FoldedPair, Norm, Pair, Sources, fold, fold_tensors, tensors_of

SIX = 6  # sources of a convolution
_owners = WeakTensorKeyDictionary()  # by the first convolution's weight, with which they go


def _kept(x: Tensor, sources: Sources, settings: Any, make: Callable[[], Any]) -> Any:
    """What `make` makes of the weights, made once; None while they keep changing, or where changes are not counted."""
    given = [t for t in sources if t is not None]
    if any(t.is_inference() for t in given):
        return None
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return make()  # at every replay, which so sees what became of the weights
    owner = _owners.setdefault(given[0], Owner())
    kind = (None, x.dtype, x.device)
    waiting = owner.waiting(kind)
    if waiting is not None:
        waiting.note(given[0])
        return None
    form = owner.obtain(kind, given, settings, make)
    form.uses += 1
    if form.value is not None:
        if detect_stale_weights.on:
            form.check(make())
        if x.is_cuda:
            form.join()
    return form.value


def _units(sources: Sources, eps: Sequence[float]) -> list[tuple[Sources, float]]:
    return [(sources[SIX * i : SIX * (i + 1)], e) for i, e in enumerate(eps)]


def _windows(geometry: Sequence[int]) -> list[tuple[Any, ...]]:
    """stride, padding and dilation of each convolution of a stage."""
    where = [geometry[i + 4 : i + GEOMETRY] for i in range(0, len(geometry), GEOMETRY)]
    return [(tuple(w[:2]), tuple(w[2:4]), tuple(w[4:])) for w in where]


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
    groups: int,
    relu: bool,
    backend: str | None,
) -> Tensor | None:
    how: Any = {"stride": tuple(stride), "dilation": tuple(dilation), "groups": groups, "backend": backend}

    def make() -> Any:
        return pack_conv(*fold_tensors(sources, eps), like=x, **how)

    packed = _kept(x, sources, ("conv", eps, *how.values()), make)
    if packed is None:
        return None
    weight, bias = packed
    return conv_bias_relu(x, weight, bias, residual, **how, padding=pair(padding), relu=relu)


def _plain_conv(x: Tensor, sources: Sources, eps: float, residual: Tensor | None, *rest: Any) -> Tensor:
    *where, relu, _ = rest
    y = _conv_bn(x, sources, eps, *where)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def _stage(
    x: Tensor,
    sources: Sources,
    eps: Sequence[float],
    geometry: Sequence[int],
    lengths: Sequence[int],
    shortcut: bool,
    projects: bool,
) -> Tensor | None:
    def make() -> PackedResidualStage | None:
        units = zip(_units(sources, eps), _windows(geometry), strict=True)
        folded = [FoldedConv(*fold_tensors(*unit), *window) for unit, window in units]
        projection = folded.pop() if projects else None
        stage, first = None, 0
        for length in lengths:
            block = folded[first : first + length]
            packed = pack_residual_block(
                block, None if first else projection, shortcut=bool(first) or shortcut, like=x, backend=None
            )
            if packed is None:  # on another machine, or another device, than the one that recorded
                return None
            stage, first = packed if stage is None else stage.then(packed), first + length
        return stage

    stage = _kept(x, sources, ("stage", *eps, *geometry, *lengths, shortcut, projects), make)
    return stage and residual_stage(x, stage)


def _plain_stage(
    x: Tensor,
    sources: Sources,
    eps: Sequence[float],
    geometry: Sequence[int],
    lengths: Sequence[int],
    shortcut: bool,
    projects: bool,
) -> Tensor:
    units, windows = _units(sources, eps), _windows(geometry)
    first = 0
    for block, length in enumerate(lengths):
        y = x
        for i in range(first, first + length):
            y = _conv_bn(y if i == first else F.relu(y), *units[i], *windows[i])
        if projects and block == 0:
            y = y + _conv_bn(x, *units[-1], *windows[-1])
        elif shortcut or block > 0:
            y = y + x
        x, first = F.relu(y), first + length
    return x


def _inception(x: Tensor, sources: Sources, eps: Sequence[float], backend: str | None) -> Tensor | None:
    def make() -> FoldedInception:
        return FoldedInception.of([fold_tensors(*unit) for unit in _units(sources, eps)], x, backend)

    packed = _kept(x, sources, ("inception", backend, *eps), make)
    return packed and inception(x, *packed, backend=backend)


def _plain_inception(x: Tensor, sources: Sources, eps: Sequence[float], backend: str | None) -> Tensor:
    units = _units(sources, eps)

    def layer(i: int, y: Tensor) -> Tensor:
        return F.relu(_conv_bn(y, *units[i], 1, units[i][0][0].size(2) // 2))

    branches = (layer(0, x), layer(2, layer(1, x)), layer(4, layer(3, x)), layer(5, F.max_pool2d(x, 3, 1, 1)))
    return torch.cat(branches, 1)


def _wants_derivative(x: Tensor, sources: Sources, *rest: Any) -> bool:
    if transforms_active():
        return True
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *sources, *rest))


def _define(
    schema: str, fake: Callable[..., Any], function: Callable[..., Tensor | None], plain: Callable[..., Tensor]
) -> None:
    """Declare an op on the weights of a block's modules. `function` runs it on what was folded, or gives None where
    nothing is kept; `plain` is the same in plain PyTorch, and what autograd sees, so that the op has every derivative
    that PyTorch's modules have."""

    def in_xs_dtype(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What the graph holds has been cast, or not, when it was recorded."""

        def call(x: Tensor, *rest: Any) -> Tensor:
            if autocast_dtype(x) is None:
                return run(x, *rest)
            with torch.autocast(x.device.type, enabled=False):
                return run(x, *rest)

        return call

    def in_plain_pytorch(x: Tensor, *rest: Any) -> Tensor:
        return in_result_format(plain(x, *rest), x)

    def folded(x: Tensor, *rest: Any) -> Tensor:
        out = function(x, *rest)
        return in_plain_pytorch(x, *rest) if out is None else out

    define_in_python(schema, fake, in_xs_dtype(folded), in_xs_dtype(in_plain_pytorch), _wants_derivative)


_define(
    "folded_conv(Tensor x, Tensor?[] sources, float eps, Tensor? residual, SymInt[] stride, SymInt[] padding, SymInt[] "
    "dilation, SymInt groups, bool relu, str? backend) -> Tensor",
    lambda x, sources, eps, residual, *where: empty_result(x, sources[0].shape, *where[:3]),
    _conv,
    _plain_conv,
)
_define(
    "folded_stage(Tensor x, Tensor?[] sources, float[] eps, SymInt[] geometry, SymInt[] lengths, bool shortcut, bool "
    "projects) -> Tensor",
    lambda x, sources, eps, *where: fake_stage(x, *where),
    _stage,
    _plain_stage,
)
_define(
    "folded_inception(Tensor x, Tensor?[] sources, float[] eps, str? backend) -> Tensor",
    lambda x, sources, *_: empty_nchw(x, sum(sources[SIX * i].size(0) for i in OUTPUTS), *x.shape[2:]),
    _inception,
    _plain_inception,
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
    """relu(bn(conv(x)) + residual). torch.compile's graph folds itself where weights need no packing: it derives
    nothing of what it folds."""
    (x,) = autocast(x)
    residual = None if residual is None else residual.to(x.dtype)
    packs = conv.groups == 1 and packable(x, "conv_bias_relu_fwd", backend)
    if not packs and not is_recording():
        return FoldedPair.of(conv, fold(conv, norm), x, backend).run(x, residual, relu=relu, backend=backend)
    sources, (eps,) = _sources([(conv, norm)])
    where = (*(pair(n) for n in _window(conv)[1:]), conv.groups, relu, backend)
    if not asks_for_channels_last(conv.weight):
        return ops.folded_conv(x, sources, eps, residual, *where)
    return in_channels_last(ops.folded_conv(in_channels_last(x), sources, eps, residual, *where))


def traced_stage(x: Tensor, blocks: Sequence[Sequence[Pair]], projection: Pair | None, *, shortcut: bool) -> Tensor:
    """Residual blocks one after the other; the first one's shortcut is nothing, its input, or a projection of it."""
    pairs = [*chain.from_iterable(blocks), *([] if projection is None else [projection])]
    sources, eps = _sources(pairs)
    where: list[int] = []
    for conv, _ in pairs:
        where += [conv.in_channels, conv.out_channels, *chain.from_iterable(pair(n) for n in _window(conv))]
    return ops.folded_stage(x, sources, eps, where, list(map(len, blocks)), shortcut, projection is not None)


def traced_inception(x: Tensor, pairs: Sequence[Pair], backend: str | None) -> Tensor:
    """A whole Inception block; the pairs in the order of ops.inception's weights."""
    return ops.folded_inception(x, *_sources(pairs), backend)
