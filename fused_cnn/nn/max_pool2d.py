"""MaxPool2d: torch.nn.MaxPool2d that writes and saves no indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .._backends import usable
from .._candidates import transforms_active
from .._library import has_kernel
from ..ops import max_pool2d
from ..ops._conv import IntPair
from .calls import is_traced, kind_of
from .fold import Pair
from .module import FusedBlock

WINDOW = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


class MaxPool2d(FusedBlock):
    """torch.nn.MaxPool2d over the project's max_pool2d.

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: as torch.nn.MaxPool2d takes them.
        backend: "reference", "native", "triton", or None for the best at hand; PyTorch's pool runs where the named one
            has none for the input's device.

    Input (N, C, H, W) -> output (N, C, H', W').
    """

    fused_reads = (*FusedBlock.fused_reads, *WINDOW, "return_indices")

    def __init__(
        self,
        kernel_size: IntPair,
        stride: IntPair | None = None,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        ceil_mode: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, kernel_size if stride is None else stride
        self.padding, self.dilation, self.ceil_mode, self.backend = padding, dilation, ceil_mode, backend

    def forward(self, input: Tensor) -> Tensor:  # as nn.MaxPool2d names it
        return super().forward(input)

    def fused_plain_forward(self, input: Tensor) -> Tensor:
        return F.max_pool2d(input, *self.fused_window())

    def fused_window(self) -> tuple[Any, ...]:
        """kernel_size, stride, padding, dilation and ceil_mode."""
        return self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode

    def fused_problem(self) -> str | None:
        return "returns indices" if getattr(self, "return_indices", False) else None

    def fused_run(self, x: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """There is nothing to fold here, and no child whose forward would be skipped."""
        if is_traced(x):
            fits = x.dim() == 4 and not transforms_active() and not self._fused_is_plain_in_trace()
        else:
            fits = kind_of(x) is not None and self.fused_known().problem is None
        named = self.backend if self.backend in ("native", "triton") else None
        missing = named and usable(named, x.device) and not has_kernel("max_pool2d_fwd", named, x.device.type)
        if missing or not fits or not x.is_floating_point():  # nn.MaxPool2d takes integers, too
            return plain(x)
        return max_pool2d(x, *self.fused_window(), backend=self.backend)

    def fused_skipped(self) -> list[nn.Module]:
        return []

    def fused_pairs(self) -> list[Pair]:
        return []
