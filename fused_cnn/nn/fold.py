"""Folding BatchNorm into the convolution before it: which modules are understood, and the fold.

In eval bn(conv(x)) is one convolution (arXiv 1502.03167, section 3.1): weight' = weight * gamma / sqrt(var + eps) and
bias' = beta + (bias - mean) * gamma / sqrt(var + eps).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._candidates import measuring
from .._layout import asks_for_channels_last, in_channels_last
from .._library import has_kernel, kernel
from ..ops import (
    FoldedConv,
    PackedConv,
    PackedInception,
    PackedResidualStage,
    conv_bias_relu,
    pack_conv,
    pack_inception,
    residual_stage,
    stem,
)
from ..ops._conv import ConvGeometry, autocast, runs_packed
from .snapshot import COMPUTING, LIBRARY, SHARDED, call_problem, hooks

Norm = nn.BatchNorm2d | None  # a convolution may have none
Pair = tuple[nn.Conv2d, Norm]
Sources = Sequence[Any]  # of one folded convolution: six tensors, or None for those that are not there


def stands_for_another(t: Any) -> bool:
    """Whether it is one of PyTorch's tensors that stand for others in a trace."""
    kind = type(t)
    return kind.__name__ in ("FakeTensor", "FunctionalTensor") and kind.__module__.startswith("torch._subclasses.")


def is_own(kind: type, name: str, uses: frozenset[str] | None = None) -> bool:
    """Whether class.name is the method that its class was written with, and not one that took its place, and what it
    calls torch and F are PyTorch's; with `uses`, also that it uses no other names than these."""
    home = next((base for base in kind.__mro__ if name in vars(base)), None)
    function = vars(home)[name] if home else None
    return (
        isinstance(function, FunctionType)
        and home is not None
        and function.__globals__ is getattr(sys.modules.get(home.__module__), "__dict__", None)
        and function.__qualname__ == f"{home.__qualname__}.{name}"
        and all(function.__globals__.get(name, module) is module for name, module in LIBRARY.items())
        and (uses is None or uses.issuperset(function.__code__.co_names))
    )


def skip_problem(module: Any, *kinds: type) -> str | None:
    """Why a module's forward cannot be taken for that of one of these classes, and skipped; None where it can."""
    kind = type(module)
    if kind not in kinds:
        return f"is {kind.__name__}, not {kinds[0].__name__}"
    if any(hooks(module)):
        return "has hooks"
    if "_call_impl" in vars(module):
        return "has a _call_impl of its own"
    for name in COMPUTING:
        if name in vars(module):
            return f"has a {name} of its own"
        if hasattr(kind, name) and not is_own(kind, name):
            return f"is of a class whose {name} was replaced"
    return call_problem(kind)


def conv_problem(module: Any) -> str | None:
    """Why a module is not the convolution that the fused ops compute."""
    problem = skip_problem(module, nn.Conv2d)
    if problem is None and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        problem = f"pads with {module.padding_mode!r}, {module.padding!r}"
    if problem is None:
        values = [getattr(module, name) for name in ("stride", "padding", "dilation", "groups")]
        if not all(type(n) is int for value in values for n in (value if type(value) is tuple else (value,))):
            problem = f"has stride, padding, dilation and groups of other types than int and tuple: {values}"
    problem = problem or _tensor_problem(module, "weight", "bias")
    return problem or ("has no weight" if module.weight is None else None)


def norm_problem(module: Any) -> str | None:
    """Why a module is not the BatchNorm that the fused ops compute."""
    problem = skip_problem(module, nn.BatchNorm2d)
    if problem is None and type(module.eps) not in (float, int):
        problem = f"has an eps that is a {type(module.eps).__name__}"
    return problem or _tensor_problem(module, "weight", "bias", "running_mean", "running_var")


def _tensor_problem(module: nn.Module, *needed: str) -> str | None:
    """Parametrisations, sharding and offloading keep weights elsewhere, or as tensors of another kind."""
    held = {**module._parameters, **module._buffers}
    for name in needed:
        if name not in held:
            return f"has no parameter or buffer {name}"
    for name, t in held.items():
        is_plain = type(t) in (Tensor, nn.Parameter) or stands_for_another(t)
        if t is not None and not (is_plain and t.layout is torch.strided):
            return f"has a {name} that is a {type(t).__name__} of layout {t.layout}"
        if name in vars(module):
            return f"has a {name} of its own"
    return None


def pair_problem(conv: Any, norm: Any, names: Sequence[str]) -> str | None:
    """Why two modules are not the convolution and the BatchNorm that the fused ops compute."""
    problems = ((names[0], conv_problem(conv)), (names[1], norm_problem(norm)))
    return next((f"{name} {problem}" for name, problem in problems if problem), None)


def sources_of(pairs: Iterable[Pair]) -> Iterator[Tensor]:
    """All tensors that the folded weights are made of; and BatchNorm's count of batches, which tells that its
    statistics have changed where PyTorch's version counters do not."""
    for pair in pairs:
        for module in pair:
            if module is not None:
                yield from (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)


def pair_settings(conv: nn.Conv2d, norm: Norm) -> tuple[Any, ...]:
    """What the folded weights depend on beside the tensors."""
    return (*geometry(conv).values(), None if norm is None else norm.eps)


def has_running_statistics(pair: Pair) -> bool:
    """Whether the pair's BatchNorm, if any, normalises with constants."""
    return pair[1] is None or not (pair[1].training or pair[1].running_mean is None)


def can_be_constant(pair: Pair) -> bool:
    """Whether what is folded of a pair may be kept: where parameters are gathered for each call, as fully_shard does,
    nothing tells that their shards have changed."""
    return has_running_statistics(pair) and not getattr(pair[0], SHARDED, False)


def wants_gradient(x: Tensor, tensors: Iterable[Tensor]) -> bool:
    """Whether autograd records what is done with x and these tensors."""
    return torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors))


def fold(conv: nn.Conv2d, bn: Norm) -> FoldedConv:
    """The one convolution that equals `bn(conv(x))` in eval, in float32 (float64 for float64)."""
    weight, bias = fold_tensors(tensors_of(conv, bn), 0.0 if bn is None else bn.eps)
    return FoldedConv(weight, bias, **geometry(conv))


def tensors_of(conv: nn.Conv2d, bn: Norm) -> Sources:
    """The convolution's weight and bias; BatchNorm's weight, bias, mean and variance, all None where there is none."""
    if bn is None:
        return conv.weight, conv.bias, None, None, None, None
    return conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var


def fold_tensors(sources: Sources, eps: float) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of the folded convolution, of what `tensors_of` gives."""
    weight, bias, gamma, beta, mean, var = sources
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    if var is not None:
        scale = torch.rsqrt(var.to(wide) + eps)
        if gamma is not None:
            scale = scale * gamma.to(wide)
        bias = ((0 if bias is None else bias) - mean.to(wide)) * scale
        if beta is not None:
            bias = bias + beta.to(wide)
        weight = weight * scale.view(-1, 1, 1, 1)
    return weight, bias


def geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """conv2d's keyword arguments, in its order."""
    window: Any = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return ConvGeometry.of(*window)._asdict()


class FoldedInception(NamedTuple):
    """What ops.inception takes of a block beside its input."""

    weights: Sequence[Tensor] | PackedInception
    biases: Sequence[Tensor]

    @classmethod
    def of(cls, folded: Sequence[tuple[Tensor, Tensor | None]], like: Tensor, backend: str | None) -> FoldedInception:
        """For inputs of `like`'s dtype and device, of the folded weights and biases in the op's order."""
        biases = [weight.new_zeros(weight.size(0)) if bias is None else bias for weight, bias in folded]
        return cls(*pack_inception([weight for weight, _ in folded], biases, like=like, backend=backend))


class FoldedPair(NamedTuple):
    """A convolution and its BatchNorm as conv_bias_relu takes them, packed where that is possible. Where `on_gpu` says
    so a GPU's kernel is called as it is: it has the public function's checks, and PyTorch's own among its tiles."""

    weight: Tensor | PackedConv
    bias: Tensor | None
    geometry: dict[str, Any]
    on_gpu: bool
    x_channels_last: bool  # whether x is to be, so that the result is
    y_channels_last: bool  # whether the result is to be: an x of one channel lies both ways

    @classmethod
    def of(cls, conv: nn.Conv2d, folded: FoldedConv, like: Tensor, backend: str | None) -> FoldedPair:
        """For inputs of `like`'s dtype and device."""
        weight, bias, stride, _, dilation, groups = folded
        how: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "backend": backend}
        asks, has_one = asks_for_channels_last(conv.weight), conv.in_channels == 1
        packed = pack_conv(weight, bias, like=like, **how)
        on_gpu = like.is_cuda and runs_packed(like, "conv_bias_relu_fwd", backend)
        return cls(*packed, geometry(conv), on_gpu, asks and not has_one, asks and has_one)

    def run(self, x: Tensor, residual: Tensor | None = None, *, relu: bool, backend: str | None) -> Tensor:
        """relu(bn(conv(x)) + residual), in the convolution's dtype."""
        x = autocast(x)[0]
        residual = None if residual is None else residual.to(x.dtype)
        if self.x_channels_last:
            x = in_channels_last(x)
        if self.on_gpu and measuring.record is None:
            window = self.geometry.values()
            y = kernel("conv_bias_relu_fwd", "native")(x, self.weight, self.bias, residual, *window, relu)
        else:
            y = conv_bias_relu(x, self.weight, self.bias, residual, **self.geometry, relu=relu, backend=backend)
        return in_channels_last(y) if self.y_channels_last else y

    def run_pooled(self, x: Tensor, *, pool_padding: int, ceil_mode: bool, backend: str | None) -> Tensor:
        """The 3x3 max pool of stride 2 over relu(bn(conv(x))), where the weight is not packed."""
        assert isinstance(self.weight, Tensor)
        (x,) = autocast(x)
        x = in_channels_last(x) if self.x_channels_last else x
        window = self.geometry["stride"], self.geometry["padding"]
        if self.on_gpu and measuring.record is None and has_kernel("stem_fwd", "native", "cuda"):
            y = kernel("stem_fwd", "native")(x, self.weight, self.bias, *window, pool_padding, ceil_mode)
        else:
            how: dict[str, Any] = {"pool_padding": pool_padding, "ceil_mode": ceil_mode, "backend": backend}
            y = stem(x, self.weight, self.bias, stride=window[0], padding=window[1], **how)
        return in_channels_last(y) if self.y_channels_last else y


class FoldedBlock(NamedTuple):
    """A block's convolutions one by one, where no op takes the whole of it."""

    convolutions: list[FoldedPair]
    projection: FoldedPair | None


class OneOp(NamedTuple):
    """The weights of one block or more as one op takes them, and whether its result is channels_last however x lies."""

    stage: PackedResidualStage
    channels_last: bool

    def then(self, block: OneOp) -> OneOp:
        return OneOp(self.stage.then(block.stage), self.channels_last or block.channels_last)

    def run(self, x: Tensor) -> Tensor:
        (x,) = autocast(x)
        y = residual_stage(in_channels_last(x) if self.channels_last else x, self.stage)
        return in_channels_last(y) if self.channels_last else y  # an x of one channel lies both ways
