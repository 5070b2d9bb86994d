"""Batch normalisation with ReLU, residual and concatenation in plain PyTorch: the definition that every backend is
compared with; and its gradients, for where these are differentiated again.

The gradients' arguments are the kernels': vectors of one value per channel, and `mean` and `rstd` of all inputs in
order.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._layout import in_result_format
from ..conv.reference import relu_bwd
from .args import BatchNormArgs
from .statistics import split_channels

PIXELS = (0, 2, 3)  # dimensions of a channel's values


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


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


class Normalised:
    """An input and what became of it, in the vectors' dtype; in training the statistics are functions of x."""

    def __init__(self, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, training: bool) -> None:
        self.dtype, self.weight = x.dtype, _per_channel(weight)
        self.training = training and x.numel() > 0  # an empty batch has no statistics
        x, self.rstd = x.to(mean.dtype), _per_channel(rstd)
        if self.training:
            centred = x - x.mean(PIXELS, keepdim=True)
            var = centred.square().mean(PIXELS, keepdim=True)
            eps = (self.rstd.pow(-2) - var).detach()  # what forward added to the variance
            self.rstd = (var + eps).rsqrt()
        else:
            centred = x - _per_channel(mean)
        self.values = centred * self.rstd
        self.out = self.values * self.weight + _per_channel(bias)

    def bwd(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients (x, weight, bias) from that of `out`."""
        product = grad * self.values
        grad_weight, grad_bias = product.sum(PIXELS), grad.sum(PIXELS)
        if self.training:
            grad = grad - grad.mean(PIXELS, keepdim=True) - self.values * product.mean(PIXELS, keepdim=True)
        return (grad * (self.weight * self.rstd)).to(self.dtype), grad_weight, grad_bias


def normalised(
    xs: Sequence[Tensor],
    mean: Tensor,
    rstd: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    training: Sequence[bool],
) -> list[Normalised]:
    sizes = [x.size(1) for x in xs]
    statistics = split_channels(mean, sizes), split_channels(rstd, sizes)
    return [Normalised(*branch) for branch in zip(xs, *statistics, weights, biases, training, strict=True)]


def bn_relu_concat_bwd(
    grad_out: Tensor,
    xs: Sequence[Tensor],
    mean: Tensor,
    rstd: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    training: Sequence[bool],
    relu: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    branches = normalised(xs, mean, rstd, weights, biases, training)
    parts = grad_out.to(mean.dtype).split([x.size(1) for x in xs], 1)
    found = [b.bwd(relu_bwd(part, b.out if relu else None)) for b, part in zip(branches, parts, strict=True)]
    grad_xs, grad_weights, grad_biases = zip(*found, strict=True)
    return list(grad_xs), torch.cat(grad_weights), torch.cat(grad_biases)


def bn_add_relu_bwd(
    grad_out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    training: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ReLU's mask is given, or follows from both inputs where the residual is normalised, too."""
    grad_out = grad_out.to(mean.dtype)
    if residual is not None:
        ours, theirs = normalised([x, residual], mean, rstd, weights, biases, training)
        grad = relu_bwd(grad_out, ours.out + theirs.out)
        (grad_x, *grads), (grad_residual, *others) = ours.bwd(grad), theirs.bwd(grad)
        grad_weight, grad_bias = map(torch.cat, zip(grads, others, strict=True))
        return grad_x, grad_residual, grad_weight, grad_bias
    assert mask is not None
    n, c, h, w = x.shape
    bits = mask.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    passes = bits.flatten(1)[:, :c].view(n, h, w, c).permute(0, 3, 1, 2) == 1
    grad = torch.where(passes, grad_out, 0)
    (only,) = normalised([x], mean, rstd, weights, biases, training)
    grad_x, grad_weight, grad_bias = only.bwd(grad)
    return grad_x, grad.to(x.dtype), grad_weight, grad_bias
