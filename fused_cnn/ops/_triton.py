"""What every room's triton.py shares: whether the interpreter is on, ReLU as PyTorch defines it, the form of its list SHIPPED."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Shipped:
    """One kernel as a launcher calls it. Each room lists its own in SHIPPED, and `make compile-check` compiles them without a GPU.

    `pointers` are in the dtype that the op runs in, `float32` are always float32, `scalars` are 32-bit integers; `constants` are the
    kernel's tl.constexpr arguments.
    """

    kernel: triton.JITFunction
    pointers: tuple[str, ...]
    scalars: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    constants: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3


def interpreting() -> bool:
    """Whether TRITON_INTERPRET made Triton run kernels in Python, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def grid_1d(elements: int, block: int) -> tuple[int]:
    """A one-dimensional grid, checked against CUDA's limit of 2^31 - 1 blocks."""
    blocks = triton.cdiv(elements, block)
    if blocks >= 2**31:
        raise ValueError(f"{elements} elements need {blocks} blocks of {block}; one launch takes at most {2**31 - 1}")
    return (blocks,)


def dense_like(t: Tensor, like: Tensor) -> Tensor:
    """t in like's dense layout (channels_last or contiguous), copied only where it is not so already."""
    from .._layout import result_format

    return t.contiguous(memory_format=result_format(like))


@triton.jit
def relu(v):
    """max(v, 0) that keeps NaN."""
    return tl.where(v <= 0, 0.0, v)


@triton.jit
def relu_grad(grad, out):
    """The gradient passes where out > 0 or out is NaN."""
    return tl.where(out <= 0, 0.0, grad)
