"""What one batch normalisation needs besides its input, as one value, with nn.BatchNorm2d's exact meaning."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class BatchNormArgs(NamedTuple):
    """The arguments of F.batch_norm that belong to the layer (Ioffe & Szegedy, arXiv 1502.03167).

    Attributes:
        weight, bias: (C,) scale and shift (the paper's gamma and beta), or None for 1 and 0; x's dtype, or float32 for
            16-bit x.
        running_mean, running_var: (C,) population statistics, or None. Read where `training` is False, else updated in
            place: running = (1 - momentum) * running + momentum * batch, with the unbiased variance of the batch.
        training: normalise with the batch's own statistics (True) or with the running ones (False: also a frozen
            layer).
        momentum: weight of the new batch in the running statistics; a 0-dimensional tensor is read without a device
            sync.
        eps: added to the variance.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool = False
    momentum: float | Tensor = 0.1
    eps: float = 1e-5

    @classmethod
    def of(cls, module: nn.BatchNorm2d) -> BatchNormArgs:
        """The arguments of one forward pass of `module`: as BatchNorm2d.forward does, it counts the pass.

        In training with running statistics, `module.num_batches_tracked` grows by one, and momentum=None becomes the
        cumulative average 1 / num_batches_tracked. Without running statistics the batch's own are used in eval mode
        too.
        """
        momentum: float | Tensor = 0.0 if module.momentum is None else module.momentum
        if module.training and module.track_running_stats and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
            if module.momentum is None:
                momentum = module.num_batches_tracked.to(torch.float64).reciprocal()
        tracked = not module.training or module.track_running_stats
        running_mean = module.running_mean if tracked else None
        running_var = module.running_var if tracked else None
        batch_statistics = module.training or (module.running_mean is None and module.running_var is None)
        return cls(module.weight, module.bias, running_mean, running_var, batch_statistics, momentum, module.eps)
