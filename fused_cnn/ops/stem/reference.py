"""A network's first convolution and its pool in PyTorch: the definition that every backend is compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..max_pool.reference import max_pool2d

Pair = tuple[int, int]
POOL: tuple[Pair, Pair, Pair] = ((3, 3), (2, 2), (1, 1))  # kernel, stride, dilation


def stem(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, pool_padding: int, ceil_mode: bool
) -> Tensor:
    y = torch.relu(F.conv2d(x, weight, bias, stride, padding))
    kernel, step, dilation = POOL
    return max_pool2d(y, kernel, step, (pool_padding, pool_padding), dilation, ceil_mode)
