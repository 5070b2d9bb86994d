"""relu(x + residual) in plain PyTorch: the definition that every backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    return torch.relu(x + residual)
