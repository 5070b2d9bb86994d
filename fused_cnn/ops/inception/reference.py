"""A whole Inception block, BatchNorm folded, in plain PyTorch: the definition that every backend is compared with."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def inception(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    def conv(x: Tensor, i: int) -> Tensor:
        return torch.relu(F.conv2d(x, weights[i], biases[i], padding=weights[i].size(2) // 2))

    branch1 = conv(x, 0)
    branch2 = conv(conv(x, 1), 2)
    branch3 = conv(conv(x, 3), 4)
    branch4 = conv(F.max_pool2d(x, 3, 1, 1), 5)
    return torch.cat([branch1, branch2, branch3, branch4], 1)
