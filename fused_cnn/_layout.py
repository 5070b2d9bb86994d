"""The one layout rule of every op, shared by fake kernels and the reference (csrc/shared/checks.h states it for C++).

A result is channels_last where the first input's channels are adjacent in memory, else contiguous (N, C, H, W).
"""

import torch
from torch import Tensor

from ._candidates import transforms_active


def result_format(x: Tensor) -> torch.memory_format:
    """The memory format that an op gives its result when its first input is `x`."""
    adjacent = x.stride(1) == 1 and x.size(1) > 1
    return torch.channels_last if adjacent else torch.contiguous_format


def in_result_format(out: Tensor, x: Tensor) -> Tensor:
    """`out` in the memory format of a result whose op's first input is `x`. Under a transform it is left as it lies:
    vmap has more dimensions in memory than it shows, and no rule for channels_last."""
    return out if transforms_active() else out.contiguous(memory_format=result_format(x))


def asks_for_channels_last(weight: Tensor) -> bool:
    """Whether PyTorch's convolution gives a channels_last result for this weight, however its input lies. Of a 1x1
    kernel, which is contiguous either way, its strides tell."""
    return weight.stride(1) == 1 and weight.stride(3) >= weight.size(1) and weight.numel() > weight.size(0)


def in_channels_last(x: Tensor) -> Tensor:
    """`x`, copied where its channels are not adjacent."""
    return x if x.stride()[1] == 1 else x.contiguous(memory_format=torch.channels_last)


def empty_nchw(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised (N, channels, height, width) tensor in `like`'s result format, dtype and device."""
    return torch.empty(
        (like.size(0), channels, height, width), dtype=like.dtype, device=like.device, memory_format=result_format(like)
    )
