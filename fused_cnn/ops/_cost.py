"""What one call of a registered op launches, reads, writes and computes: the unit of account of fused_cnn.analysis.

A room states it for its registered ops in its cases.py (COSTS). What convolutions have in common is here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ._conv import empty_result
from ._flops import conv_flops

Arguments = Mapping[str, Any]  # an op's arguments by the names in its schema


@dataclass(frozen=True)
class Cost:
    """One call: one kernel reads every argument once and writes every result once, unless stated.

    `reads` says how often an argument is read, by name; `reads_more` is bytes read besides; `rewrites` counts further
    passes that read the first result and write it again; `scratch` is bytes of temporaries inside the op, written once
    and read once. `flops` is of ops that PyTorch's counter does not know; ours it does (_flops.py). Where these are a
    direct convolution's, `flops_saved` is what the algorithm that runs spares of them.
    """

    launches: int = 1
    reads: Mapping[str, int] = field(default_factory=dict)
    reads_more: int = 0
    rewrites: int = 0
    scratch: int = 0
    flops: int = 0
    flops_saved: int = 0


def one_pass(args: Arguments, result: Any) -> Cost:
    """The rule, without an exception."""
    return Cost()


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of memory behind the elements; a dimension expanded with stride 0 counts once."""
    elements = tensor.numel()
    if elements and tensor.layout is torch.strided:
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if stride == 0:
                elements //= size
    return elements * tensor.element_size()


def engine_conv(
    x: Tensor, weight_shape: Sequence[int], *window: Sequence[int], in_place: bool = False
) -> tuple[Tensor, Cost]:
    """The native CPU convolution of x with a packed weight: its result, on the meta device, and its cost. `window` is
    stride, padding and dilation."""
    out = empty_result(x.to("meta"), weight_shape, *window)
    read, done = _library.conv_work(
        x.shape, weight_shape[0], weight_shape[2:], *window, bfloat16=x.dtype == torch.bfloat16, in_place=in_place
    )
    return out, Cost(reads={"packed": 0}, reads_more=read, flops_saved=conv_flops(out, weight_shape) - done)
