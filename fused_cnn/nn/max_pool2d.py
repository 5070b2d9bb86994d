"""MaxPool2d: torch.nn.MaxPool2d that writes and saves no indices."""

from __future__ import annotations

from operator import attrgetter

import torch.nn.functional as F
from torch import Tensor, nn

from .._backends import usable
from .._library import has_kernel
from ..ops import max_pool2d
from ..ops._conv import IntPair
from .module import FusedModule

WINDOW = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


class MaxPool2d(FusedModule):
    """torch.nn.MaxPool2d over the project's max_pool2d.

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: as torch.nn.MaxPool2d takes them.
        backend: "reference", "native", "triton", or None for the best at hand; PyTorch's pool runs where the named one
            has none for the input's device, as native has on a GPU.

    Input (N, C, H, W) -> output (N, C, H', W').
    """

    settings = attrgetter("backend", *WINDOW)

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

    @classmethod
    def from_reference(cls, module: nn.Module, *, backend: str | None = None) -> MaxPool2d:
        """The fused form of an nn.MaxPool2d that returns no indices."""
        return cls.adopt(module, backend=backend, **{name: getattr(module, name) for name in WINDOW})

    def forward(self, x: Tensor) -> Tensor:
        window = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        named = self.backend if self.backend in ("native", "triton") else None
        missing = named and usable(named, x.device) and not has_kernel("max_pool2d_fwd", named, x.device.type)
        if missing or x.dim() != 4 or not x.is_floating_point():  # nn.MaxPool2d takes these too
            return F.max_pool2d(x, *window)
        return max_pool2d(x, *window, backend=self.backend)
