"""PyTorch's max pool: the definition that every backend is compared with; and its gradient, for where that is
differentiated again."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def max_pool2d(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool) -> Tensor:
    return F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)


def max_pool2d_bwd(grad_out: Tensor, x: Tensor, *window: Any) -> Tensor:
    if x.is_cuda and x.dtype == torch.float64:
        grad_out, x = grad_out.contiguous(), x.contiguous()  # PyTorch 2.11's kernel for others misaligns its memory
    _, indices = torch.ops.aten.max_pool2d_with_indices(x, *window)
    grad: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(grad_out, x, *window, indices)
    return grad
