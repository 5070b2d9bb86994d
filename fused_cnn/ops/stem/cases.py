"""The stems of ResNet-50 and GoogLeNet, and awkward ones."""

from typing import Any

import torch
from torch import Tensor

from .._cases import Case, Layer, Maker, OpCases, Pass, awkward, layers
from .._conv import out_sides, pair
from .._cost import one_pass
from .._flops import conv_flops
from ..conv.cases import REASON
from .op import stem

REAL: list[Layer] = [
    ("resnet50 stem", (1, 3, 224, 224), {"out": 64}),
    ("googlenet stem", (1, 3, 224, 224), {"out": 64, "pool_padding": 0, "ceil_mode": True}),
]
ODD: list[Layer] = [
    ("grayscale", (2, 1, 37, 22), {"out": 24}),
    ("two channels", (2, 2, 20, 41), {"out": 72, "padding": (2, 0), "pool_padding": 0}),
    ("no bias, wider than a tile", (1, 3, 9, 500), {"out": 8, "bias": False}),
    ("no padding of either, wide", (1, 3, 24, 491), {"out": 64, "padding": 6, "pool_padding": 0}),
    ("many rows", (1, 3, 131, 16), {"out": 64, "ceil_mode": True}),
    ("one window", (2, 3, 7, 7), {"out": 16, "padding": 0}),
    ("RGBA", (2, 4, 21, 18), {"out": 64}),
    ("odd outputs", (2, 3, 21, 18), {"out": 13}),
    ("another kernel", (2, 3, 15, 18), {"out": 16, "kernel": 3, "padding": 1}),
]


def make(case: Case, maker: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    o = dict(case.options)
    weight = maker.weight(o.pop("out"), case.shape[1], *pair(o.pop("kernel", 7)))
    bias = maker.vector(weight.size(0)) if o.pop("bias", True) else None
    return (maker.activation(*case.shape), weight, bias), o


def least(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: Any = 2, padding: Any = 3, **_: Any
) -> tuple[Pass, Pass]:
    sides = out_sides(x, weight.shape[2:], pair(stride), pair(padding), (1, 1))
    convolution = torch.empty(x.size(0), weight.size(0), *sides, device="meta")
    flops = conv_flops(convolution, weight.shape)
    return Pass((x, weight, out), flops), Pass((out, convolution, x, weight, x, weight), 2 * flops)


COSTS = {"stem_fwd": one_pass}
CASES = OpCases(
    stem,
    (*layers(REAL, ODD), *(c for c in awkward(out=16) if min(c.shape[2:]) > 4 or c.shape[0] == 0)),
    make,
    least,
    rounding=4,
    summation=16,
    gradient_jumps=True,  # tests/ops/test_stem.py compares it with that of the parts
    reason=f"a maximum is one of a convolution's results: {REASON}",
)
