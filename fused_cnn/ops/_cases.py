"""What a room's cases.py is made of: inputs of real and of awkward shapes, the bytes and FLOPs that they cost, and the
tolerance.

Tests and benchmarks read the same cases, so what is timed is what is tested.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops

LAYOUTS = ("channels_last", "contiguous", "slice", "offset")


@dataclass(frozen=True)
class Case:
    """One input: x's shape and whatever else the room's `make` needs. `real` cases are layers of real networks."""

    name: str
    shape: tuple[int, int, int, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    real: bool = False

    def batched(self, n: int) -> Case:
        """The same layer at batch n."""
        return Case(self.name, (n, *self.shape[1:]), self.options, self.real)


class Maker:
    """Makes a case's random tensors: seeded, in one dtype, on one device, activations in one memory layout.

    Layouts: "channels_last"; "contiguous" (N, C, H, W); "slice" (channels of a wider channels_last tensor); "offset"
    (channels_last, starting one element into its storage, so that nothing is 16-byte aligned). On the device "meta"
    they have shapes alone.
    """

    def __init__(
        self, dtype: torch.dtype, layout: str = "channels_last", device: str = "cpu", seed: int = 0, grad: bool = True
    ) -> None:
        self.dtype, self.layout, self.device, self.grad = dtype, layout, device, grad
        self.generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def _normal(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float32, device=self.device)
        return values.to(dtype or self.dtype)

    def activation(self, *shape: int) -> Tensor:
        """A standard-normal (N, C, H, W) tensor in the maker's layout."""
        n, c, h, w = shape
        values = self._normal(shape)
        if self.layout == "contiguous":
            x = values
        elif self.layout == "channels_last":
            x = values.contiguous(memory_format=torch.channels_last)
        elif self.layout == "slice":
            wide = torch.empty(n, h, w, c + 5, dtype=self.dtype, device=self.device)
            x = wide[..., 3 : 3 + c].permute(0, 3, 1, 2).copy_(values)
        elif self.layout == "offset":
            storage = torch.empty(values.numel() + 1, dtype=self.dtype, device=self.device)
            x = storage[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(values)
        else:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        return x.detach().requires_grad_(self.grad)

    def weight(self, *shape: int) -> Tensor:
        """A (out, in, kh, kw) weight, scaled so that a convolution keeps its input's variance (He, arXiv 1502.01852,
        section 2.2)."""
        fan_in = max(1, shape[1] * shape[2] * shape[3])
        return (self._normal(shape) * (2 / fan_in) ** 0.5).detach().requires_grad_(self.grad)

    def vector(self, n: int, *, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """A per-channel vector, such as a bias, in the maker's dtype unless another is given."""
        return (self._normal((n,), dtype) * std + mean).detach().requires_grad_(self.grad)

    def buffer(self, n: int, *, low: float, high: float) -> Tensor:
        """A per-channel buffer without gradient, uniform in [low, high), float32 (float64 for float64)."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return (torch.rand(n, generator=self.generator, device=self.device) * (high - low) + low).to(dtype)


class Pass(NamedTuple):
    """A forward or backward pass at its least: the tensors that it reads and writes (twice where it must read one
    twice), and its floating-point operations. Vectors of one value per channel, and ReLU's bits, are left out."""

    tensors: Sequence[Tensor | None]
    flops: int


@dataclass(frozen=True)
class CaseCost:
    """The least memory traffic in bytes and the arithmetic of one call: forward, and forward's backward."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int
    backward_flops: int


@dataclass(frozen=True)
class OpCases:
    """One public op: its cases and how to judge and to price them.

    `make(case, maker)` returns the positional and keyword arguments; every tensor among them that requires grad gets a
    gradient. `least(out, *args, **kwargs)` is the call's forward and backward pass, of which only shapes matter.
    `registered` names the registered op by which a backend is known to implement this one, where it is not
    `<name>_fwd`. `rounding` is the number of roundings to the dtype that the absolute term allows, `summation` the
    units in the last place of the accumulator (float32, or float64) that a long sum in another order may lose, and
    `reason` says why so many. With `gradient_jumps` gradients are not compared in a dtype: where rounding moves two
    values past each other, a maximum's goes elsewhere.
    """

    op: Callable[..., Tensor]
    cases: Sequence[Case]
    make: Callable[[Case, Maker], tuple[tuple[Any, ...], dict[str, Any]]]
    least: Callable[..., tuple[Pass, Pass]]
    rounding: float
    reason: str
    registered: str = ""
    summation: float = 0.0
    gradient_jumps: bool = False

    @property
    def name(self) -> str:
        return self.op.__name__

    @property
    def decides(self) -> str:
        """The registered op that decides whether a backend implements this one."""
        return self.registered or f"{self.name}_fwd"

    @property
    def room(self) -> str:
        """The folder of fused_cnn/ops that the op's kernels are in."""
        return self.op.__module__.split(".")[2]

    def cost(self, case: Case, itemsize: int) -> CaseCost:
        """What a call costs in a dtype of so many bytes."""
        args, kwargs = self.make(case, Maker(torch.float32, device="meta", grad=False))
        passes = self.least(self.op(*args, **kwargs, backend="reference"), *args, **kwargs)
        moved = (itemsize * sum(t.numel() for t in p.tensors if t is not None) for p in passes)
        return CaseCost(*moved, *(p.flops for p in passes))


def rooms() -> list[ModuleType]:
    """Every room's cases.py, which has CASES, one OpCases or several, and COSTS, what its registered ops cost
    (_cost.py)."""
    found = (room.name for room in pkgutil.iter_modules(ops.__path__) if room.ispkg)
    return [importlib.import_module(f"{ops.__name__}.{name}.cases") for name in found]


Layer = tuple[str, tuple[int, int, int, int], Mapping[str, Any]]


def layers(real: Sequence[Layer], odd: Sequence[Layer] = ()) -> list[Case]:
    return [*(Case(*layer, real=True) for layer in real), *(Case(*layer) for layer in odd)]


def awkward(**options: Any) -> list[Case]:
    """Odd channel counts and sizes in pairs, kept small, and an empty batch."""
    pairs = [(1, 55), (3, 28), (17, 14), (65, 7), (112, 7), (480, 1), (3, 1), (17, 7), (1, 1)]
    shapes = [*((2, c, s, s) for c, s in pairs), (1, 17, 5, 9), (0, 17, 7, 7)]
    return [Case("x".join(map(str, shape)), shape, options) for shape in shapes]
