"""The statistics that a batch normalisation uses, and the update of the running ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._checks import vector_dtype
from ..._library import kernel
from .args import BatchNormArgs


@torch.no_grad()
def statistics(xs: Sequence[Tensor], bns: Sequence[BatchNormArgs], backend: str) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of every branch, concatenated; updates the running statistics of branches in
    training.

    The result shares no memory with the buffers, so that backward sees the values that forward used.
    """
    in_training = [i for i, bn in enumerate(bns) if bn.training and xs[i].numel() > 0]
    branches: list[tuple[Tensor, Tensor] | None] = [None] * len(xs)
    if in_training:
        mean, rstd, var = kernel("bn_stats", backend)([xs[i] for i in in_training], [bns[i].eps for i in in_training])
        sizes = [xs[i].size(1) for i in in_training]
        for i, m, r, v in zip(in_training, *(split_channels(t, sizes) for t in (mean, rstd, var)), strict=True):
            _update_running(bns[i], m, v)
            branches[i] = (m, r)
        if len(in_training) == len(xs):
            return mean, rstd
    filled = [b or _given(x, bn) for b, x, bn in zip(branches, xs, bns, strict=True)]
    if len(filled) == 1:
        return filled[0]
    means, rstds = zip(*filled, strict=True)
    return torch.cat(means), torch.cat(rstds)


def _given(x: Tensor, bn: BatchNormArgs) -> tuple[Tensor, Tensor]:
    """Running statistics; an empty batch in training, which has none of its own, leaves nothing to normalise."""
    if bn.running_mean is None or bn.running_var is None or bn.training:
        ones = x.new_ones(x.size(1), dtype=vector_dtype(x))
        return torch.zeros_like(ones), ones
    mean = bn.running_mean.to(vector_dtype(x), copy=True)
    return mean, (bn.running_var.to(vector_dtype(x)) + bn.eps).rsqrt()


def _update_running(bn: BatchNormArgs, mean: Tensor, var: Tensor) -> None:
    """running = (1 - momentum) * running + momentum * batch, F.batch_norm's formula; `var` is the unbiased variance. No
    lerp, which makes NaN of a batch whose variance overflows."""
    if bn.running_mean is None or bn.running_var is None:
        return
    for old, new in ((bn.running_mean, mean), (bn.running_var, var)):
        batch, weight = new.to(old.dtype), bn.momentum
        if isinstance(weight, Tensor):
            weight = weight.to(old.dtype)
            old.mul_(1 - weight).add_(batch * weight)
        else:
            old.mul_(1 - weight).add_(batch, alpha=weight)


def split_channels(vector: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Each input's channels of a vector that holds all of them."""
    return (vector,) if len(sizes) == 1 else vector.split(list(sizes))
