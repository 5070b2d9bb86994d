"""add_relu on ResNet-50's four residual shapes and on awkward ones."""

from __future__ import annotations

from typing import Any

from .._cases import Case, Cost, Maker, OpCases, awkward_shapes
from .op import add_relu

REAL = [
    ("resnet50 layer1", (1, 256, 56, 56)),
    ("resnet50 layer2", (1, 512, 28, 28)),
    ("resnet50 layer3", (1, 1024, 14, 14)),
    ("resnet50 layer4", (1, 2048, 7, 7)),
]


def make(case: Case, maker: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (maker.activation(*case.shape), maker.activation(*case.shape)), {}


def cost(case: Case, itemsize: int) -> Cost:
    n, c, h, w = case.shape
    elements = n * c * h * w
    return Cost(3 * elements * itemsize, 3 * elements * itemsize, 2 * elements, elements)


CASES = OpCases(
    name="add_relu",
    op=add_relu,
    cases=(
        *(Case(name, shape, real=True) for name, shape in REAL),
        *(Case("x".join(map(str, shape)), shape) for shape in awkward_shapes()),
    ),
    make=make,
    cost=cost,
    rounding=1,
    reason="one addition, rounded once, as eager's: they agree to the bit where both add in float32",
)
