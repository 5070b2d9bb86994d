"""The one layout rule of every op, shared by fake kernels and the reference (csrc/shared/checks.h states it for C++).

A result is channels_last where the first input's channels are adjacent in memory, else contiguous (N, C, H, W).
"""

import torch
from torch import Tensor


def result_format(x: Tensor) -> torch.memory_format:
    """The memory format that an op gives its result when its first input is `x`."""
    adjacent = x.stride(1) == 1 and x.size(1) > 1
    return torch.channels_last if adjacent else torch.contiguous_format


def empty_nchw(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised (N, channels, height, width) tensor in `like`'s result format, dtype and device."""
    return torch.empty(
        (like.size(0), channels, height, width), dtype=like.dtype, device=like.device, memory_format=result_format(like)
    )
