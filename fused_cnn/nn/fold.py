"""Folding BatchNorm into the convolution before it: which pairs are understood, when they can be folded, and the fold.

In eval bn(conv(x)) is one convolution (arXiv 1502.03167, section 3.1): weight' = weight * gamma / sqrt(var + eps) and
bias' = beta + (bias - mean) * gamma / sqrt(var + eps).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import FoldedConv

Norm = nn.BatchNorm2d | None  # a convolution may have none
ConvBN = tuple[nn.Conv2d, nn.BatchNorm2d]  # as blocks are built; is_plain_conv_bn asks what stands there today


def hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The tables of what is called when this very module runs."""
    return (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)


def has_hooks(module: nn.Module) -> bool:
    """Whether someone watches this very module, so that skipping its forward would be noticed."""
    return any(hooks(module))


def is_plain_conv_bn(conv: nn.Module, bn: nn.Module | None) -> bool:
    """Whether a pair means exactly what the fused ops compute; subclasses, SyncBatchNorm and hooked modules do not."""
    return (
        type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not has_hooks(conv)
        and (bn is None or (type(bn) is nn.BatchNorm2d and not has_hooks(bn)))
    )


def can_fold(x: Tensor, pairs: Iterable[tuple[nn.Conv2d, Norm]]) -> bool:
    """Whether BatchNorm uses running statistics in all the pairs, and no gradient is asked for."""
    modules = [m for pair in pairs for m in pair if m is not None]
    if any(isinstance(m, nn.BatchNorm2d) and (m.training or m.running_mean is None) for m in modules):
        return False
    if not torch.is_grad_enabled():
        return True
    return not x.requires_grad and not any(p.requires_grad for m in modules for p in m.parameters())


def fold(conv: nn.Conv2d, bn: Norm) -> FoldedConv:
    """The one convolution that equals `bn(conv(x))` in eval, in float32 (float64 for float64)."""
    wide = torch.float64 if conv.weight.dtype == torch.float64 else torch.float32
    weight, bias = conv.weight.to(wide), None if conv.bias is None else conv.bias.to(wide)
    if bn is not None:
        assert bn.running_mean is not None and bn.running_var is not None
        scale = torch.rsqrt(bn.running_var.to(wide) + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight.to(wide)
        bias = ((0 if bias is None else bias) - bn.running_mean.to(wide)) * scale
        if bn.bias is not None:
            bias = bias + bn.bias.to(wide)
        weight = weight * scale.view(-1, 1, 1, 1)
    return FoldedConv(weight, bias, **geometry(conv))


def geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """conv2d's keyword arguments."""
    return {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
