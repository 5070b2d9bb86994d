"""What the device can do at most, measured beside the work: a copy's bandwidth, a matrix product's rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..measure import Interleaved, Work

COPIED = {"cpu": 256 << 20, "cuda": 1 << 30}  # bytes: far more than any cache holds
SIDE = {"cpu": 1536, "cuda": 8192}  # of the square matrices


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second, read and written together; floating-point operations a second by dtype."""

    copy: float
    product: Mapping[str, float]

    def limit(self, least_bytes: int, flops: int, dtype: str) -> float:
        """Seconds: the roofline's bound on work that moves so many bytes and does so many operations (Williams et al.,
        Communications of the ACM 52(4), 2009)."""
        return max(least_bytes / self.copy, flops / self.product[dtype])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def short(dtype: torch.dtype) -> str:
    """A dtype's name in rows and files: float32."""
    return str(dtype).removeprefix("torch.")


def measure(device: str, dtypes: Sequence[torch.dtype], seconds: float = 0.5) -> Ceilings:
    """Copy and multiply for about so long each; medians."""
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    works: dict[str, Work] = {"copy": lambda: target.copy_(source)}
    side = SIDE[device]
    for dtype in dtypes:
        matrix = torch.randn(side, side, device=device).to(dtype)
        works[short(dtype)] = lambda m=matrix: m @ m  # type: ignore[misc]
    taken = {name: t.median for name, t in Interleaved(works, device).run(seconds * len(works)).items()}
    return Ceilings(2 * source.numel() / taken.pop("copy"), {name: 2 * side**3 / t for name, t in taken.items()})
