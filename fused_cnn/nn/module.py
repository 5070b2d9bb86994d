"""FusedModule: what the fused blocks share: convolution + BatchNorm + residual + ReLU over a block's ordinary children.

In eval without gradients BatchNorm is folded into the convolution, once. In training, and in eval with gradients, the
convolution is cuDNN's or oneDNN's, and BatchNorm, the addition and the ReLU are one fused op.
"""

from collections.abc import Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..ops import BatchNormArgs, bn_add_relu, bn_relu, bn_relu_conv, conv_bias_relu, pack_conv
from ..ops._conv import autocast, on_16_bytes
from .cache import FoldingModule
from .fold import ConvBN, Norm, can_fold, fold, geometry, is_plain_conv_bn

Self = TypeVar("Self", bound="FusedModule")
_HOOKS = [name for name in vars(nn.Module()) if "forward" in name or "backward" in name]  # where a module keeps them


class FusedModule(FoldingModule):
    """A block that runs its convolutions with what follows them as fused ops.

    `backend` is "reference" (plain eager PyTorch), "native" or None for the best at hand.
    """

    backend: str | None = None
    settings = attrgetter("backend")
    _original: tuple[nn.Module, ...] = ()  # in a tuple, so that it is not registered as a child

    @classmethod
    def adopt(cls: type[Self], module: nn.Module, *, backend: str | None = None, **attributes: Any) -> Self:
        """A fused module over `module`'s very children: parameters, buffers, their names and the hooks are shared."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._modules.update(module._modules)
        self.training, self.backend, self._original = module.training, backend, (module,)
        hooks = {name: getattr(module, name) for name in _HOOKS}
        for name, value in (attributes | hooks).items():
            setattr(self, name, value)
        return self

    def to_reference(self) -> nn.Module:
        """The unfused module: the one that this was made from, over today's children; else the same class, unfused."""
        if not self._original:
            plain = type(self).adopt(self, backend="reference")
            plain.__dict__.update({**self.__getstate__(), **plain.__dict__, "_original": ()})
            return plain
        (module,) = self._original
        module._modules.clear()
        module._modules.update(self._modules)
        module.training = self.training
        return module

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"

    def conv_bn(
        self, conv: nn.Conv2d, bn: Norm, x: Tensor, *, relu: bool = True, residual: Tensor | None = None
    ) -> Tensor:
        """relu(bn(conv(x)) + residual); bn, residual and ReLU are optional. A pair that is not plain runs as it is."""
        folded = self.recall((conv, bn), x)
        if folded is None and (self.backend == "reference" or not is_plain_conv_bn(conv, bn)):
            return _add_relu(conv(x) if bn is None else bn(conv(x)), residual, relu)
        if residual is not None and residual.dtype != autocast(x[:0])[0].dtype:  # PyTorch promotes the sum
            return _add_relu(self.conv_bn(conv, bn, x, relu=False), residual, relu)
        if folded is None and can_fold(x, [(conv, bn)]):
            weight, bias, stride, _, dilation, groups = fold(conv, bn)
            how: Any = {"stride": stride, "dilation": dilation, "groups": groups, "backend": self.backend}
            folded = pack_conv(weight, bias, like=autocast(x[:0])[0], **how)
            self.remember((conv, bn), x, folded, [conv] if bn is None else [conv, bn])
        if folded is not None:  # eval: one convolution
            x, (weight, bias) = autocast(x)[0], folded
        elif bn is None:
            weight, bias = conv.weight, conv.bias
        else:
            return self.bn_act(conv(on_16_bytes(x)), bn, relu=relu, residual=residual)
        return conv_bias_relu(x, weight, bias, residual, **geometry(conv), relu=relu, backend=self.backend)

    def bn_act(self, y: Tensor, bn: nn.BatchNorm2d, *, relu: bool = True, residual: Tensor | None = None) -> Tensor:
        """relu(bn(y) + residual) of a convolution's raw output y."""
        args = BatchNormArgs.of(bn)
        if residual is None:
            return bn_relu(y, args, relu=relu, backend=self.backend)
        if relu and residual.dtype == y.dtype:
            return bn_add_relu(y, args, residual, backend=self.backend)
        return _add_relu(bn_relu(y, args, relu=False, backend=self.backend), residual, relu)

    def conv_chain(self, pairs: Sequence[ConvBN], x: Tensor) -> Tensor:
        """conv_n(relu(bn_(n-1)(... conv_1(x)))), for training; what lies between is not saved for backward."""
        y = pairs[0][0](on_16_bytes(x))
        for (_, bn), (conv, _) in pairwise(pairs):
            weight, bias = conv.weight.to(y.dtype), None if conv.bias is None else conv.bias.to(y.dtype)
            y = bn_relu_conv(y, BatchNormArgs.of(bn), weight, bias, **geometry(conv), backend=self.backend)
        return y


def _add_relu(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    y = y if residual is None else y + residual
    return torch.relu(y) if relu else y
