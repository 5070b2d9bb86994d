"""conv1x1_bias_relu on the reductions of GoogLeNet and the bottleneck ends of ResNet-50, and on awkward shapes."""

from __future__ import annotations

from typing import Any

from .._cases import Case, Cost, Maker, OpCases, awkward_shapes
from .._conv import out_size
from .op import conv1x1_bias_relu

REAL = [
    ("googlenet 3a reduce3x3", (1, 192, 28, 28), {"out": 96}),
    ("googlenet 4a reduce5x5", (1, 480, 14, 14), {"out": 16}),
    ("googlenet 5b branch1", (1, 832, 7, 7), {"out": 384}),
    ("resnet50 layer1 conv1", (1, 256, 56, 56), {"out": 64}),
    ("resnet50 layer1 conv3", (1, 64, 56, 56), {"out": 256, "residual": True}),
    ("resnet50 layer2 downsample", (1, 256, 56, 56), {"out": 512, "stride": 2, "relu": False}),
    ("resnet50 layer3 conv3", (1, 256, 14, 14), {"out": 1024, "residual": True}),
    ("resnet50 layer4 conv3", (1, 512, 7, 7), {"out": 2048, "residual": True}),
]
ODD = [
    ("no bias", (2, 17, 7, 7), {"out": 3, "bias": False}),
    ("stride 2, residual", (2, 33, 9, 7), {"out": 65, "stride": 2, "residual": True}),
    ("linear", (1, 3, 5, 5), {"out": 1, "relu": False}),
    ("stride past the end", (2, 5, 1, 6), {"out": 7, "stride": 3}),
]


def _sides(case: Case) -> tuple[int, int]:
    stride = case.options.get("stride", 1)
    height, width = (out_size(side, 1, stride, 0, 1) for side in case.shape[2:])
    return height, width


def make(case: Case, maker: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    o = case.options
    n, c = case.shape[:2]
    x, weight = maker.activation(*case.shape), maker.weight(o["out"], c, 1, 1)
    bias = maker.vector(o["out"]) if o.get("bias", True) else None
    residual = maker.activation(n, o["out"], *_sides(case)) if o.get("residual") else None
    return (x, weight, bias, residual), {"stride": o.get("stride", 1), "relu": o.get("relu", True)}


def cost(case: Case, itemsize: int) -> Cost:
    n, c = case.shape[:2]
    out = case.options["out"]
    pixels = n * _sides(case)[0] * _sides(case)[1]
    x, y, w = pixels * c, pixels * out, c * out  # a strided convolution reads only the pixels that it uses
    residual = y if case.options.get("residual") else 0
    product = 2 * pixels * c * out
    return Cost((x + w + residual + y) * itemsize, (2 * y + 2 * x + 2 * w + residual) * itemsize, product, 2 * product)


CASES = OpCases(
    name="conv1x1_bias_relu",
    op=conv1x1_bias_relu,
    cases=(
        *(Case(name, shape, options, real=True) for name, shape, options in REAL),
        *(Case(name, shape, options) for name, shape, options in ODD),
        *(Case("x".join(map(str, shape)), shape, {"out": 19, "residual": True}) for shape in awkward_shapes()),
    ),
    make=make,
    cost=cost,
    rounding=4,
    summation=16,
    reason="bias and residual are added before the one rounding where eager rounds after each step; a sum over thousands of products in "
    "one accumulator loses more than eager's blocked one",
)
