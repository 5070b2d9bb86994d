"""The room's ops in plain PyTorch: the definitions that every backend is compared with; and their gradients, for where
these are differentiated again."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_bias_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        out = out + residual
    return torch.relu(out) if relu else out


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    return torch.relu(x + residual)


def relu_bwd(grad_out: Tensor, out: Tensor | None) -> Tensor:
    """`out` is ReLU's result, or None where there is no ReLU. The gradient is 0 at 0 and passes where `out` is NaN."""
    return grad_out if out is None else torch.ops.aten.threshold_backward(grad_out, out, 0)


def conv_bias_relu_bwd(
    grad_out: Tensor,
    out: Tensor | None,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *needs: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients (x, weight, bias, residual); `needs` says which of the first three are wanted."""
    grad = relu_bwd(grad_out, out)
    grads = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.size(0)], stride, padding, dilation, False, [0, 0], groups, needs
    )
    return (*grads, grad)
