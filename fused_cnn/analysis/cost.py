"""The unit of account: what one call of an op launches, reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Arguments = Mapping[str, Any]  # an op's argument names and values


@dataclass(frozen=True)
class Cost:
    """One call: one kernel reads every argument once and writes every result once, unless stated.

    `reads` says how often an argument is read, by name; `reads_more` is bytes read besides; `rewrites` counts
    further passes that read the first result and write it again; `scratch` is bytes of temporaries inside the
    op, written once and read once; `flops` is of ops that PyTorch's own counter does not know.
    """

    launches: int = 1
    reads: Mapping[str, int] = field(default_factory=dict)
    reads_more: int = 0
    rewrites: int = 0
    scratch: int = 0
    flops: int = 0


FREE = Cost(launches=0)
ONE_PASS = Cost()


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_in(item)]
    return []


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of memory behind the elements; a dimension expanded with stride 0 counts once."""
    elements = tensor.numel()
    if elements and tensor.layout is torch.strided:
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if stride == 0:
                elements //= size
    return elements * tensor.element_size()
