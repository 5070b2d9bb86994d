"""What the 1x1 reductions of an Inception block save: its parameters and multiply-adds beside those of the
naive form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..nn import Inception
from .layout import Row, convolutions
from .measure import measure


def reduction(name: str, block: nn.Module, input_size: Sequence[int]) -> dict[str, Any]:
    """An Inception block and its naive form (arXiv 1409.4842, figure 2, b and a) on the same input.

    Args:
        name: what to call the row.
        block: an Inception block with its 1x1 reductions.
        input_size: (N, C, H, W) of the block's input.

    Returns:
        params, macs and channels of the block's result, and the same with "naive_" before them. The naive
        form concatenates the pool as it is, so its result is wider, and in a network of such blocks the next
        one costs more still.
    """
    convs = convolutions(block)
    widths = [conv.out_channels for conv in convs]
    with torch.device("meta"):
        naive = Inception(
            convs[0].in_channels, *widths, kernel5=convs[4].kernel_size[0], bias=convs[0].bias is not None,
            norm=any(isinstance(m, nn.BatchNorm2d) for m in block.modules()), reduce=False,
        )  # fmt: skip
    figures: dict[str, Any] = {"name": name}
    for prefix, module in (("", block), ("naive_", naive)):
        (measured,) = measure(module, [Row(name, "inception", [""])], input_size)
        assert measured.result is not None
        figures |= {
            f"{prefix}params": measured.params,
            f"{prefix}macs": measured.macs,
            f"{prefix}channels": measured.result[1],
        }
    return figures
