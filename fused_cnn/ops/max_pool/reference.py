"""PyTorch's max pool: the definition that every backend is compared with."""

import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def max_pool2d(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool) -> Tensor:
    return F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
