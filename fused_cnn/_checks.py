"""Argument checks shared by the public ops; messages state what was expected and what came."""

from collections.abc import Sequence

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


def check_branches(op: str, branches: Sequence[Tensor]) -> None:
    """There is at least one branch, and all are (N, C_i, H, W) with the same N, H and W, dtype and device."""
    if len(branches) == 0:
        raise ValueError(f"{op}: at least one branch is needed, got none")
    first = branches[0]
    for i, branch in enumerate(branches):
        check_nchw(op, f"branch {i}", branch)
        check_same(op, "branch 0", first, f"branch {i}", branch, shape=False)
        if (branch.shape[0], *branch.shape[2:]) != (first.shape[0], *first.shape[2:]):
            raise ValueError(
                f"{op}: branch {i} must have branch 0's batch, height and width: "
                f"branch 0 has shape {tuple(first.shape)}, branch {i} has {tuple(branch.shape)}"
            )


def vector_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which kernels take per-channel vectors for an input x: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_parameter(op: str, name: str, v: Tensor | None, channels: int, x: Tensor) -> None:
    """v, if given, is a per-channel vector in x's dtype or, for a 16-bit x, in float32."""
    check_vector(op, name, v, channels, x)
    if v is not None and v.dtype not in (x.dtype, vector_dtype(x)):
        raise TypeError(f"{op}: {name} must be {x.dtype} or {vector_dtype(x)}, got {v.dtype}")
