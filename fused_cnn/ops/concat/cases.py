"""concat_bias_relu on GoogLeNet's concatenations and on awkward ones; a case's shape is (N, sum of C_i, H, W)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._cases import Case, Layer, Maker, OpCases, Pass, awkward, layers
from .._cost import one_pass
from .op import concat_bias_relu

GOOGLENET = [
    ("googlenet 3a", (64, 128, 32, 32), 28),
    ("googlenet 3b", (128, 192, 96, 64), 28),
    ("googlenet 4a", (192, 208, 48, 64), 14),
    ("googlenet 4d", (112, 288, 64, 64), 14),
    ("googlenet 5b", (384, 384, 128, 128), 7),
]
REAL: list[Layer] = [(name, (1, sum(c), side, side), {"channels": c}) for name, c, side in GOOGLENET]
ODD: list[Layer] = [
    ("no bias", (2, 17, 7, 7), {"channels": (9, 8), "bias": False}),
    ("linear", (2, 17, 7, 7), {"channels": (9, 8), "relu": False}),
    ("linear, no bias", (2, 17, 7, 7), {"channels": (9, 8), "relu": False, "bias": False}),
    ("one branch", (2, 24, 5, 3), {"channels": (24,)}),
    ("an empty branch", (2, 24, 5, 3), {"channels": (5, 0, 19)}),
]


def split(channels: int) -> tuple[int, ...]:
    """Uneven branches that add up to `channels`."""
    parts = (channels // 2, channels // 3)
    return tuple(c for c in (*parts, channels - sum(parts)) if c > 0)


def make(case: Case, maker: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    n, total, h, w = case.shape
    branches = [maker.activation(n, c, h, w) for c in case.options.get("channels", split(total))]
    bias = maker.vector(total) if case.options.get("bias", True) else None
    return (branches, bias), {"relu": case.options.get("relu", True)}


def least(out: Tensor, branches: Sequence[Tensor], bias: Tensor | None, *, relu: bool) -> tuple[Pass, Pass]:
    return Pass((*branches, out), 2 * out.numel()), Pass((out, out if relu else None, *branches), 2 * out.numel())


COSTS = {"concat_bias_relu_fwd": one_pass, "concat_bias_relu_bwd": one_pass}
CASES = OpCases(
    concat_bias_relu,
    (*layers(REAL, ODD), *awkward()),
    make,
    least,
    rounding=1,
    reason="one addition, rounded once, as eager's; the bias's gradient is a float32 sum, rounded once",
)
