"""inception on GoogLeNet's nine blocks (torchvision's 3x3 third branch, and the paper's 5x5), and on awkward shapes."""

from __future__ import annotations

from typing import Any

from .._cases import Case, Cost, Maker, OpCases
from .op import inception

# in channels, side, (1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool proj): arXiv 1409.4842, table 1
TABLE = {
    "3a": (192, 28, (64, 96, 128, 16, 32, 32)),
    "3b": (256, 28, (128, 128, 192, 32, 96, 64)),
    "4a": (480, 14, (192, 96, 208, 16, 48, 64)),
    "4e": (528, 14, (256, 160, 320, 32, 128, 128)),
    "5b": (832, 7, (384, 192, 384, 48, 128, 128)),
}
ODD = [
    ("odd channels", (2, 17, 7, 5), {"widths": (3, 5, 7, 1, 2, 9), "kernel5": 5}),
    ("one pixel", (1, 65, 1, 1), {"widths": (16, 8, 17, 4, 8, 8), "kernel5": 3}),
    ("empty batch", (0, 16, 7, 7), {"widths": (8, 8, 8, 8, 8, 8), "kernel5": 5}),
]


def _weight_shapes(case: Case) -> list[tuple[int, int, int, int]]:
    c = case.shape[1]
    w1, r3, w3, r5, w5, pool = case.options["widths"]
    k5 = case.options["kernel5"]
    return [(w1, c, 1, 1), (r3, c, 1, 1), (w3, r3, 3, 3), (r5, c, 1, 1), (w5, r5, k5, k5), (pool, c, 1, 1)]


def make(case: Case, maker: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    shapes = _weight_shapes(case)
    weights = [maker.weight(*shape) for shape in shapes]
    biases = [maker.vector(shape[0], std=0.5) for shape in shapes]
    return (maker.activation(*case.shape), weights, biases), {}


def cost(case: Case, itemsize: int) -> Cost:
    n, c, h, w = case.shape
    w1, _, w3, _, w5, pool = case.options["widths"]
    weights = sum(a * b * k * k for a, b, k, _ in _weight_shapes(case))
    x, y = n * c * h * w, n * h * w * (w1 + w3 + w5 + pool)
    product = 2 * n * h * w * weights
    return Cost((x + weights + y) * itemsize, (2 * x + 2 * weights + 2 * y) * itemsize, product, 3 * product)


CASES = OpCases(
    name="inception",
    op=inception,
    cases=(
        *(
            Case(f"googlenet {name}", (1, c, side, side), {"widths": widths, "kernel5": 3}, real=True)
            for name, (c, side, widths) in TABLE.items()
        ),
        Case("googlenet_paper 3a", (1, 192, 28, 28), {"widths": TABLE["3a"][2], "kernel5": 5}, real=True),
        *(Case(name, shape, options) for name, shape, options in ODD),
    ),
    make=make,
    cost=cost,
    rounding=8,
    summation=16,
    reason="two convolutions in a row, each with the free summation order and the single rounding of conv_bias_relu",
)
