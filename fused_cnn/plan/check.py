"""Whether a plan gives what its network gives, also on other inputs than those that it was recorded on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._trees import tensors
from .record import NotRecordable

# Of a plan's result against the network's own, relative to the largest: the last layer sums in another order.
AGREES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def random_like(x: Tensor, size: Sequence[int], seed: int = 0) -> Tensor:
    """A tensor of another size: normal values, or for integers zeros and ones, which are somebody's indices at most.
    PyTorch's own generator is left as it is."""
    generator = torch.Generator(x.device).manual_seed(seed)
    made = torch.empty(tuple(size), dtype=x.dtype, device=x.device)
    return made.normal_(generator=generator) if x.is_floating_point() else made.random_(0, 2, generator=generator)


def check_agree(out: Any, expected: Any, rows: int | None = None) -> None:
    """Both are results, of which the first may have more rows than `rows`.

    Raises:
        NotRecordable: they differ.
    """
    for a, b in zip(tensors(out), tensors(expected), strict=True):
        a = a if rows is None else a[:rows]
        if a.shape != b.shape or not _agrees(a, b):
            raise NotRecordable("what was recorded gives other results on other inputs: it depends on more than them")


def _agrees(out: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(out, expected)
    finite = expected.isfinite()
    if not torch.equal(finite, out.isfinite()):
        return False
    if not bool(finite.all()):
        out, expected = out.nan_to_num(), expected.nan_to_num()
        finite = finite & (expected.abs() < torch.finfo(expected.dtype).max)
    if not bool(finite.any()):
        return True
    difference, scale = (out - expected)[finite].abs().max(), expected[finite].abs().max().clamp_min(1e-30)
    return bool(difference / scale <= AGREES[expected.dtype])
