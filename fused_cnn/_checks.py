"""Argument checks shared by the public ops; messages state what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_nchw(op: str, name: str, x: Tensor) -> None:
    """x is a floating-point tensor of four dimensions."""
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must have 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float64, float32, float16 or bfloat16, got {x.dtype}")


def check_same(op: str, name_a: str, a: Tensor, name_b: str, b: Tensor, *, shape: bool = True) -> None:
    """b has a's device and dtype and, unless shape=False, its shape."""
    if a.device != b.device:
        raise ValueError(f"{op}: {name_b} must be on {name_a}'s device {a.device}, got {b.device}")
    if a.dtype != b.dtype:
        raise TypeError(f"{op}: {name_b} must have {name_a}'s dtype {a.dtype}, got {b.dtype}")
    if shape and a.shape != b.shape:
        raise ValueError(f"{op}: {name_b} must have {name_a}'s shape {tuple(a.shape)}, got {tuple(b.shape)}")


def check_vector(op: str, name: str, v: Tensor | None, channels: int, x: Tensor) -> None:
    """v, if given, has shape (channels,) and x's device."""
    if v is None:
        return
    if v.dim() != 1 or v.size(0) != channels:
        raise ValueError(f"{op}: {name} must have shape ({channels},), got {tuple(v.shape)}")
    if v.device != x.device:
        raise ValueError(f"{op}: {name} must be on the input's device {x.device}, got {v.device}")
