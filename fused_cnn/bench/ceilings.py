"""What the device can do at most: a copy's bandwidth and a matrix product's rate, measured beside the work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..measure import Work, interleaved

COPIED = {"cpu": 256 << 20, "cuda": 1 << 30}  # bytes: far more than any cache holds
SIDE = {"cpu": 1536, "cuda": 8192}  # of the square matrices


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second, read and written together; floating-point operations a second by dtype; bytes of a CPU's
    last-level cache (0 on a GPU, where an op's samples begin with caches overwritten)."""

    copy: float
    product: Mapping[str, float]
    cache: int = 0

    def rate(self, dtype: str) -> float:
        """Operations a second that products in a dtype reach at most."""
        # Without units for a 16-bit dtype our kernels compute in float32, and PyTorch's product in that dtype, which is
        # slower than its product in float32, is no ceiling.
        return max(self.product[dtype], 0.0 if dtype == "float64" else self.product.get("float32", 0.0))

    def limit(self, least_bytes: int, flops: int, dtype: str) -> tuple[float, str]:
        """Seconds that work takes at least which moves so many bytes and does so many operations (the roofline:
        Williams et al., Communications of the ACM 52(4), 2009), and what sets them: "memory"; "products"; or "cache",
        where the bytes are more work than the operations but stay in the cache: the operations alone are then a bound.
        """
        memory, products = least_bytes / self.copy, flops / self.rate(dtype)
        if memory <= products:
            return products, "products"
        return (products, "cache") if least_bytes < self.cache else (memory, "memory")


def short(dtype: torch.dtype) -> str:
    """A dtype's name in rows and files: float32."""
    return str(dtype).removeprefix("torch.")


def measure(device: str, dtypes: Sequence[torch.dtype], seconds: float = 0.5) -> Ceilings:
    """Copy and multiply for about so long each; medians."""
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    works: dict[str, Work] = {"copy": lambda: target.copy_(source)}
    side = SIDE[device]
    for dtype in dtypes if device == "cuda" else dict.fromkeys([*dtypes, torch.float32]):
        matrix = torch.randn(side, side, device=device).to(dtype)
        works[short(dtype)] = lambda m=matrix: m @ m  # type: ignore[misc]
    taken = {name: t.median for name, t in interleaved(works, device, seconds * len(works)).items()}
    copy = 2 * source.numel() / taken.pop("copy")
    products = {name: 2 * side**3 / t for name, t in taken.items()}
    caches = [*Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")] if device == "cpu" else []
    sizes = [int(file.read_text().strip().removesuffix("K")) << 10 for file in caches]  # as Linux states them
    return Ceilings(copy, products, max(sizes, default=0))
