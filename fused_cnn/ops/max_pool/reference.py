"""PyTorch's max pool: the definition that every backend is compared with; and its gradient, for where that is
differentiated again."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]
NOWHERE = 255  # the place in a window that has no pixel of x, as a dilated one may in the padding


def max_pool2d(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool) -> Tensor:
    return F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)


def max_pool2d_index_bwd(
    grad_out: Tensor,
    index: Tensor,
    size: Sequence[int],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    _: bool,
) -> Tensor:
    """x's gradient by the places in the windows: taps, row by row, or NOWHERE."""
    (n, channels, height, width), tap = grad_out.shape, index.to(torch.int64)
    y, x = (torch.arange(side, device=index.device) for side in (height, width))
    y = (y * stride[0] - padding[0]).view(-1, 1) + tap // kernel[1] * dilation[0]
    x = x * stride[1] - padding[1] + tap % kernel[1] * dilation[1]
    nowhere = index == NOWHERE
    flat = (y * size[1] + x).masked_fill(nowhere, 0).view(n, channels, height * width)
    zeros = grad_out.new_zeros(n, channels, size[0] * size[1])
    grad = grad_out.masked_fill(nowhere, 0).reshape(n, channels, height * width)
    return zeros.scatter_add(2, flat, grad).view(n, channels, *size)


def max_pool2d_bwd(grad_out: Tensor, x: Tensor, *window: Any) -> Tensor:
    if x.is_cuda and x.dtype == torch.float64:
        grad_out, x = grad_out.contiguous(), x.contiguous()  # PyTorch 2.11's kernel for others misaligns its memory
    _, indices = torch.ops.aten.max_pool2d_with_indices(x, *window)
    grad: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(grad_out, x, *window, indices)
    return grad
