"""The convolutions and residual additions of GoogLeNet and ResNet-50, and awkward shapes and geometry."""

from __future__ import annotations

from typing import Any

from .._cases import Case, Cost, Maker, OpCases, awkward_shapes
from .._conv import out_size
from .add_relu import add_relu
from .op import conv1x1_bias_relu, conv_bias_relu

Layers = list[tuple[str, tuple[int, int, int, int], dict[str, Any]]]
REAL: Layers = [
    ("googlenet stem 7x7", (1, 3, 224, 224), {"out": 64, "kernel": 7, "stride": 2, "padding": 3}),
    ("googlenet 3a 3x3", (1, 96, 28, 28), {"out": 128, "kernel": 3, "padding": 1}),
    ("googlenet_paper 4a 5x5", (1, 16, 14, 14), {"out": 48, "kernel": 5, "padding": 2}),
    ("resnet50 layer1 conv2", (1, 64, 56, 56), {"out": 64, "kernel": 3, "padding": 1}),
    ("resnet50 layer2 conv2 stride 2", (1, 128, 56, 56), {"out": 128, "kernel": 3, "stride": 2, "padding": 1}),
    ("resnet50 layer4 conv2", (1, 512, 7, 7), {"out": 512, "kernel": 3, "padding": 1}),
    ("resnet18 layer1 conv2", (1, 64, 56, 56), {"out": 64, "kernel": 3, "padding": 1, "residual": True}),
]
ODD: Layers = [
    ("dilated", (2, 8, 14, 14), {"out": 9, "kernel": 3, "padding": 2, "dilation": 2}),
    ("grouped", (2, 8, 7, 7), {"out": 12, "kernel": 3, "padding": 1, "groups": 4}),
    ("oblong", (2, 5, 9, 7), {"out": 6, "kernel": (1, 7), "padding": (0, 3)}),
    ("two strides", (2, 5, 9, 8), {"out": 6, "kernel": (3, 2), "stride": (2, 3), "padding": (1, 0)}),
    ("no bias, linear", (2, 5, 9, 8), {"out": 6, "kernel": 3, "bias": False, "relu": False}),
    ("kernel as large as the input", (2, 5, 4, 4), {"out": 6, "kernel": 4, "residual": True}),
    ("padding wider than the image", (1, 3, 2, 2), {"out": 4, "kernel": 5, "padding": 4}),
]
REAL_1X1: Layers = [
    ("googlenet 3a reduce3x3", (1, 192, 28, 28), {"out": 96}),
    ("googlenet 4a reduce5x5", (1, 480, 14, 14), {"out": 16}),
    ("googlenet 5b branch1", (1, 832, 7, 7), {"out": 384}),
    ("resnet50 layer1 conv1", (1, 256, 56, 56), {"out": 64}),
    ("resnet50 layer1 conv3", (1, 64, 56, 56), {"out": 256, "residual": True}),
    ("resnet50 layer2 downsample", (1, 256, 56, 56), {"out": 512, "stride": 2, "relu": False}),
    ("resnet50 layer3 conv3", (1, 256, 14, 14), {"out": 1024, "residual": True}),
    ("resnet50 layer4 conv3", (1, 512, 7, 7), {"out": 2048, "residual": True}),
]
ODD_1X1: Layers = [
    ("no bias", (2, 17, 7, 7), {"out": 3, "bias": False}),
    ("stride 2, residual", (2, 33, 9, 7), {"out": 65, "stride": 2, "residual": True}),
    ("linear", (1, 3, 5, 5), {"out": 1, "relu": False}),
    ("stride past the end", (2, 5, 1, 6), {"out": 7, "stride": 3}),
]
ADDED = [
    ("resnet50 layer1", (1, 256, 56, 56)),
    ("resnet50 layer2", (1, 512, 28, 28)),
    ("resnet50 layer3", (1, 1024, 14, 14)),
    ("resnet50 layer4", (1, 2048, 7, 7)),
]


def _pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _result_shape(case: Case) -> tuple[int, int, int, int]:
    o = case.options
    geometry = zip(
        case.shape[2:], *(_pair(o.get(k, d)) for k, d in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1))),
        strict=True,
    )
    height, width = (out_size(*axis) for axis in geometry)
    return case.shape[0], o["out"], height, width


def make(case: Case, maker: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    o = case.options
    x = maker.activation(*case.shape)
    weight = maker.weight(o["out"], case.shape[1] // o.get("groups", 1), *_pair(o.get("kernel", 1)))
    bias = maker.vector(o["out"]) if o.get("bias", True) else None
    residual = maker.activation(*_result_shape(case)) if o.get("residual") else None
    names = ("stride", "padding", "dilation", "groups", "relu")
    return (x, weight, bias, residual), {k: o[k] for k in names if k in o}


def cost(case: Case, itemsize: int) -> Cost:
    o = case.options
    n, c, h, w = case.shape
    _, out, height, width = _result_shape(case)
    kh, kw = _pair(o.get("kernel", 1))
    weights = out * (c // o.get("groups", 1)) * kh * kw
    # A stride that is larger than the kernel leaves pixels unread.
    x, y = n * c * min(h, height * kh) * min(w, width * kw), n * out * height * width
    residual = y if o.get("residual") else 0
    product = 2 * n * height * width * weights
    forward = (x + weights + residual + y) * itemsize
    return Cost(forward, (2 * y + 2 * x + 2 * weights + residual) * itemsize, product, 2 * product)


def make_add(case: Case, maker: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (maker.activation(*case.shape), maker.activation(*case.shape)), {}


def cost_add(case: Case, itemsize: int) -> Cost:
    n, c, h, w = case.shape
    elements = n * c * h * w
    return Cost(3 * elements * itemsize, 3 * elements * itemsize, 2 * elements, elements)


def _cases(real: Layers, odd: Layers, **options: Any) -> tuple[Case, ...]:
    awkward = [("x".join(map(str, shape)), shape, {"out": 19, "residual": True, **options}) for shape in awkward_shapes()]
    return (*(Case(*layer, real=True) for layer in real), *(Case(*layer) for layer in (*odd, *awkward)))


REASON = (
    "bias and residual are added before the one rounding where eager rounds after each step; a sum over thousands of "
    "products in one accumulator loses more than eager's blocked one"
)
CASES = [
    OpCases(
        name="conv_bias_relu",
        op=conv_bias_relu,
        cases=_cases(REAL, ODD, kernel=3, padding=1),
        make=make,
        cost=cost,
        rounding=4,
        summation=16,
        reason=REASON,
    ),
    OpCases(
        name="conv1x1_bias_relu",
        op=conv1x1_bias_relu,
        cases=_cases(REAL_1X1, ODD_1X1),
        make=make,
        cost=cost,
        registered="conv_bias_relu_fwd",
        rounding=4,
        summation=16,
        reason=REASON,
    ),
    OpCases(
        name="add_relu",
        op=add_relu,
        cases=(
            *(Case(name, shape, real=True) for name, shape in ADDED),
            *(Case("x".join(map(str, shape)), shape) for shape in awkward_shapes()),
        ),
        make=make_add,
        cost=cost_add,
        rounding=1,
        reason="one addition, rounded once, as eager's: they agree to the bit where both add in float32",
    ),
]
