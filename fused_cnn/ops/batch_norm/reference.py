"""Batch normalisation with ReLU, residual and concatenation in plain PyTorch: the definition that every backend is
compared with."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._layout import in_result_format
from .args import BatchNormArgs


def batch_norm(x: Tensor, bn: BatchNormArgs) -> Tensor:
    out = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, float(bn.momentum), bn.eps)
    return in_result_format(out, x)


def bn_relu_concat(xs: Sequence[Tensor], bns: Sequence[BatchNormArgs], relu: bool) -> Tensor:
    outs = [batch_norm(x, bn) for x, bn in zip(xs, bns, strict=True)]
    if relu:
        outs = [torch.relu(out) for out in outs]
    return in_result_format(torch.cat(outs, dim=1), xs[0]) if len(outs) > 1 else outs[0]


def bn_add_relu(x: Tensor, bn: BatchNormArgs, residual: Tensor, residual_bn: BatchNormArgs | None) -> Tensor:
    if residual_bn is not None:
        residual = batch_norm(residual, residual_bn)
    return torch.relu(batch_norm(x, bn) + residual)
