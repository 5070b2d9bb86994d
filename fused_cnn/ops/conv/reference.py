"""The room's ops in plain PyTorch: the definitions that every backend is compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._conv import ConvGeometry


def conv_bias_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: ConvGeometry, relu: bool
) -> Tensor:
    out = F.conv2d(x, weight, bias, *geometry)
    if residual is not None:
        out = out + residual
    return torch.relu(out) if relu else out


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    return torch.relu(x + residual)
