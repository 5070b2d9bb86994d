"""max_pool2d on the pools of GoogLeNet and ResNet-50, and on awkward windows."""

from math import prod
from typing import Any

from torch import Tensor

from .._cases import Case, Layer, Maker, OpCases, Pass, awkward, layers
from .._conv import IntPair, pair
from .._cost import one_pass
from .op import max_pool2d

REAL: list[Layer] = [
    ("resnet50 maxpool", (1, 64, 112, 112), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("googlenet maxpool1", (1, 64, 112, 112), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    ("googlenet maxpool3", (1, 480, 28, 28), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    ("googlenet 4a branch4", (1, 480, 14, 14), {"kernel_size": 3, "stride": 1, "padding": 1, "ceil_mode": True}),
]
ODD: list[Layer] = [
    ("window past the end", (2, 5, 6, 7), {"kernel_size": 2, "stride": 2, "ceil_mode": True}),
    ("start in the padding", (2, 5, 5, 5), {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True}),
    ("window larger than the image", (2, 5, 2, 3), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    ("dilated", (2, 7, 9, 9), {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 2}),
    ("oblong", (2, 7, 9, 9), {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1)}),
]


def make(case: Case, maker: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (maker.activation(*case.shape),), dict(case.options)


def least(out: Tensor, x: Tensor, *, kernel_size: IntPair, **window: Any) -> tuple[Pass, Pass]:
    return Pass((x, out), out.numel() * prod(pair(kernel_size))), Pass((out, x, x), out.numel())


COSTS = {
    "max_pool2d_fwd": one_pass,
    "max_pool2d_bwd": one_pass,
    "max_pool2d_index_fwd": one_pass,
    "max_pool2d_index_bwd": one_pass,
}
CASES = OpCases(
    max_pool2d,
    (*layers(REAL, ODD), *awkward(kernel_size=3, stride=1, padding=1)),
    make,
    least,
    rounding=0,
    reason="a maximum is one of its inputs: nothing is rounded",
)
