"""FusedModule: convolution + BatchNorm + residual + ReLU over a block's ordinary children, and the cache of folded weights.

In training (and in eval with gradients) the convolution is the library's and BatchNorm, the addition and the ReLU are one fused op. In
eval without gradients BatchNorm is folded into the convolution: weight' = weight * gamma / sqrt(var + eps), bias' = beta + (bias - mean) *
gamma / sqrt(var + eps). The folded weight is a cache, never saved. At every call it is checked against its sources: which tensors and
modules they are, where the tensors lie and how often PyTorch saw them change, the modules' settings, and that no hook was set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from operator import attrgetter, is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..ops import BatchNormArgs, bn_add_relu, bn_relu, bn_relu_conv, conv_bias_relu, pack_conv
from ..ops._conv import autocast, autocast_dtype, on_16_bytes

Pair = tuple[nn.Module, nn.Module | None]  # a convolution and its BatchNorm
Made = TypeVar("Made")
Self = TypeVar("Self", bound="FusedModule")


_VERSION = attrgetter("_version")
_NORM_STATE = attrgetter("training", "eps")
_CONV_STATE = attrgetter("stride", "padding", "dilation", "groups", "padding_mode")


class _Cached:
    """A value made from some modules, and what they were then: children, parameters, buffers, hooks, BatchNorm's mode and eps.

    `key` holds what else it was made for. It is asked at every call, so it compares lists in C, not item by item. The aliases keep the
    memory that the tensors had, so that no new memory can have an old address.
    """

    def __init__(self, owner: nn.Module, key: tuple[Any, ...], modules: Sequence[nn.Module], value: Any) -> None:
        self.key, self.value = key, value
        inner = [r for m in modules for r in (m._modules, m._parameters, m._buffers) if r]
        self.registries: list[dict[str, Any]] = [owner._modules, *inner]
        self.members = self._members()
        self.tensors = [t for t in self.members if isinstance(t, Tensor)]
        self.versions, self.addresses = self._versions(), self._addresses()
        self.aliases = [t.detach() for t in self.tensors]
        self.norms = [m for m in modules if isinstance(m, nn.BatchNorm2d)]
        self.norm_states = list(map(_NORM_STATE, self.norms))
        self.convs = [m for m in modules if isinstance(m, nn.Conv2d)]
        self.conv_states = list(map(_CONV_STATE, self.convs))
        self.blocks = [m for m in (owner, *modules) if isinstance(m, FusedModule)]
        self.block_states = list(map(_settings, self.blocks))
        self.hooks = [hooks for m in modules for hooks in _hooks(m)]

    def _members(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self.registries)))

    def _versions(self) -> list[int]:
        return list(map(_VERSION, self.tensors))

    def _addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.tensors))

    def current(self, key: tuple[Any, ...]) -> bool:
        members = self._members()
        return (
            key == self.key
            and len(members) == len(self.members)
            and all(map(is_, members, self.members))
            and self._versions() == self.versions
            and self._addresses() == self.addresses
            and list(map(_NORM_STATE, self.norms)) == self.norm_states
            and list(map(_CONV_STATE, self.convs)) == self.conv_states
            and list(map(_settings, self.blocks)) == self.block_states
            and not any(self.hooks)
        )


def _settings(block: FusedModule) -> Any:
    return block.settings(block)


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)


def has_hooks(module: nn.Module) -> bool:
    """Whether someone watches this very module, so that skipping its forward would be noticed."""
    return any(_hooks(module))


def understood(conv: nn.Module, bn: nn.Module | None) -> bool:
    """Whether a pair means exactly what the fused ops compute; subclasses, SyncBatchNorm and hooked modules do not."""
    return (
        type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not has_hooks(conv)
        and (bn is None or (type(bn) is nn.BatchNorm2d and not has_hooks(bn)))
    )


def fold(conv: nn.Conv2d, bn: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of the one convolution that equals `bn(conv(x))` in eval (arXiv 1502.03167, section 3.1).

    Computed, and returned, in float32 (float64 for float64).
    """
    wide = torch.float64 if conv.weight.dtype == torch.float64 else torch.float32
    bias = None if conv.bias is None else conv.bias.to(wide)
    if bn is None:
        return conv.weight.to(wide), bias
    assert bn.running_mean is not None and bn.running_var is not None
    scale = torch.rsqrt(bn.running_var.to(wide) + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.to(wide)
    shift = ((bias if bias is not None else 0) - bn.running_mean.to(wide)) * scale
    if bn.bias is not None:
        shift = shift + bn.bias.to(wide)
    return conv.weight.to(wide) * scale.view(-1, 1, 1, 1), shift


class FusedModule(nn.Module):
    """A block that runs its convolutions with what follows them as fused ops.

    `backend` is "reference" (plain eager PyTorch), "native" or None for the best at hand.
    """

    backend: str | None = None
    settings = attrgetter("backend")  # what forward depends on beside the children; cached weights are checked against it
    _cache: dict[Any, _Cached] | None = None
    _original: tuple[nn.Module, ...] = ()  # in a tuple, so that it is not registered as a child

    @classmethod
    def adopt(cls: type[Self], module: nn.Module, *, backend: str | None = None, **attributes: Any) -> Self:
        """A fused module over `module`'s very children, so that parameters, buffers and their names are shared; hooks are too."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._modules.update(module._modules)
        self._forward_hooks, self._forward_pre_hooks = module._forward_hooks, module._forward_pre_hooks
        self._forward_hooks_with_kwargs = module._forward_hooks_with_kwargs
        self._forward_pre_hooks_with_kwargs = module._forward_pre_hooks_with_kwargs
        self._forward_hooks_always_called = module._forward_hooks_always_called
        self._backward_hooks, self._backward_pre_hooks = module._backward_hooks, module._backward_pre_hooks
        self._is_full_backward_hook = module._is_full_backward_hook
        self.training, self.backend, self._original = module.training, backend, (module,)
        for name, value in attributes.items():
            setattr(self, name, value)
        return self

    def to_reference(self) -> nn.Module:
        """The unfused module: the one that this was made from, over today's children; else the same class on plain PyTorch."""
        if not self._original:
            plain = type(self).adopt(self, backend="reference")
            kept = {k: v for k, v in self.__getstate__().items() if k not in plain.__dict__}
            plain.__dict__.update(kept, _original=())
            return plain
        (module,) = self._original
        module._modules.clear()
        module._modules.update(self._modules)
        module.training = self.training
        return module

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_cache", None)  # made again at the first call after a copy or a load
        return state

    def train(self: Self, mode: bool = True) -> Self:
        self._cache = None
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"

    def folds(self, x: Tensor, *modules: nn.Module | None) -> bool:
        """Whether weights may be folded: BatchNorm uses running statistics, and no gradient is asked for."""
        present = [m for m in modules if m is not None]
        if any(isinstance(m, nn.BatchNorm2d) and (m.training or m.running_mean is None) for m in present):
            return False
        if not torch.is_grad_enabled():
            return True
        return not x.requires_grad and not any(p.requires_grad for m in present for p in m.parameters())

    def recall(self, name: Any, x: Tensor) -> Any:
        """What `remember` kept under this name, where it still holds for inputs such as x; else None."""
        if torch.compiler.is_compiling() or self._cache is None:
            return None
        found = self._cache.get(name)
        if found is None or not found.current(self._key(x)):
            return None
        if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in found.tensors)):
            return None
        return found.value

    def remember(self, name: Any, x: Tensor, modules: Sequence[nn.Module], make: Callable[[], Made]) -> Made:
        """make()'s result, kept until one of `modules`, the backend, or the dtype or device to run in, changes.

        Only for what holds without gradients and hooks: `modules` are all those whose forward is skipped.
        """
        value = make()
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        if not torch.compiler.is_compiling() and not any(t.is_inference() for t in tensors):  # whose changes cannot be seen
            if self._cache is None:
                self._cache = {}
            self._cache[name] = _Cached(self, self._key(x), modules, value)
        return value

    def _key(self, x: Tensor) -> tuple[Any, ...]:
        return (autocast_dtype(x), x.dtype, x.device, self.backend)

    def conv_bn(
        self, conv: nn.Module, bn: nn.Module | None, x: Tensor, *, relu: bool = True, residual: Tensor | None = None
    ) -> Tensor:
        """relu(bn(conv(x)) + residual); bn, the residual and the ReLU are optional. Pairs that are not understood run as they are."""
        packed = self.recall((conv, bn), x)
        if packed is None and (self.backend == "reference" or not understood(conv, bn)):
            return _eager(conv, bn, x, relu, residual)
        assert isinstance(conv, nn.Conv2d) and (bn is None or isinstance(bn, nn.BatchNorm2d))
        if residual is not None and residual.dtype != autocast(x[:0])[0].dtype:  # PyTorch promotes the sum
            y = self.conv_bn(conv, bn, x, relu=False) + residual
            return torch.relu(y) if relu else y
        if packed is None and self.folds(x, conv, bn):
            packed = self.remember((conv, bn), x, [conv] if bn is None else [conv, bn], lambda: self._pack_conv(conv, bn, x))
        if packed is not None:
            weight, bias = packed
            return conv_bias_relu(autocast(x)[0], weight, bias, residual, **geometry(conv), relu=relu, backend=self.backend)
        if bn is None:
            return conv_bias_relu(x, conv.weight, conv.bias, residual, **geometry(conv), relu=relu, backend=self.backend)
        return self.finish(conv(on_16_bytes(x)), bn, relu=relu, residual=residual)

    def _pack_conv(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, x: Tensor) -> Any:
        (like,) = autocast(x[:0])
        return pack_conv(
            *fold(conv, bn), like=like, stride=conv.stride, dilation=conv.dilation, groups=conv.groups, backend=self.backend
        )

    def finish(self, y: Tensor, bn: nn.BatchNorm2d, *, relu: bool = True, residual: Tensor | None = None) -> Tensor:
        """relu(bn(y) + residual), where the convolution's raw output y is at hand."""
        args = BatchNormArgs.of(bn)
        if residual is None:
            return bn_relu(y, args, relu=relu, backend=self.backend)
        if relu and residual.dtype == y.dtype:
            return bn_add_relu(y, args, residual, backend=self.backend)
        out = bn_relu(y, args, relu=False, backend=self.backend) + residual
        return torch.relu(out) if relu else out

    def trains(self, x: Tensor, pairs: Sequence[Pair]) -> bool:
        """Whether the pairs run as convolutions with BatchNorm fused between them, rather than folded or as they are."""
        if self.backend == "reference" or not all(bn is not None and understood(conv, bn) for conv, bn in pairs):
            return False
        return not self.folds(x, *(m for pair in pairs for m in pair))

    def raw_chain(self, pairs: Sequence[Pair], x: Tensor) -> Tensor:
        """conv_n(relu(bn_(n-1)(... conv_1(x)))), the last BatchNorm still to come; what lies between is not saved for backward."""
        y = pairs[0][0](on_16_bytes(x))
        for (_, bn), (conv, _) in pairwise(pairs):
            assert isinstance(bn, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d)
            bias = None if conv.bias is None else conv.bias.to(y.dtype)
            y = bn_relu_conv(y, BatchNormArgs.of(bn), conv.weight.to(y.dtype), bias, **geometry(conv), backend=self.backend)
        return y


def geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """conv2d's keyword arguments."""
    return {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}


def _eager(conv: nn.Module, bn: nn.Module | None, x: Tensor, relu: bool, residual: Tensor | None) -> Tensor:
    y = conv(x) if bn is None else bn(conv(x))
    if residual is not None:
        y = y + residual
    return torch.relu(y) if relu else y
