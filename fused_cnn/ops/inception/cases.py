"""inception on GoogLeNet's nine blocks (torchvision's 3x3 third branch, and the paper's 5x5), and on awkward shapes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._cases import Case, Layer, Maker, OpCases, Pass, layers
from .._cost import Arguments, Cost, engine_conv, one_pass, tensor_bytes
from .op import inception, same_size_flops, weight_shapes

# in channels, side, (1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool proj): arXiv 1409.4842, table 1
TABLE = {
    "3a": (192, 28, (64, 96, 128, 16, 32, 32)),
    "3b": (256, 28, (128, 128, 192, 32, 96, 64)),
    "4a": (480, 14, (192, 96, 208, 16, 48, 64)),
    "4e": (528, 14, (256, 160, 320, 32, 128, 128)),
    "5b": (832, 7, (384, 192, 384, 48, 128, 128)),
}
REAL: list[Layer] = [
    *((f"googlenet {name}", (1, c, s, s), {"widths": widths, "kernel5": 3}) for name, (c, s, widths) in TABLE.items()),
    ("googlenet_paper 3a", (1, 192, 28, 28), {"widths": TABLE["3a"][2], "kernel5": 5}),
]
ODD: list[Layer] = [
    ("odd channels", (2, 17, 7, 5), {"widths": (3, 5, 7, 1, 2, 9), "kernel5": 5}),
    ("one pixel", (1, 65, 1, 1), {"widths": (16, 8, 17, 4, 8, 8), "kernel5": 3}),
    ("empty batch", (0, 16, 7, 7), {"widths": (8, 8, 8, 8, 8, 8), "kernel5": 5}),
]


def make(case: Case, maker: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    shapes = weight_shapes(case.shape[1], case.options["widths"], (3, case.options["kernel5"]))
    weights = [maker.weight(*shape) for shape in shapes]
    biases = [maker.vector(shape[0], std=0.5) for shape in shapes]
    return (maker.activation(*case.shape), weights, biases), {}


def pixels(x: Tensor) -> int:
    return x.numel() // max(1, x.size(1))


def least(out: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Pass, Pass]:
    """Backward computes the reductions again."""
    shapes = [weight.shape for weight in weights]
    product = same_size_flops(x, shapes)
    backward = Pass((out, out, x, *weights, x, *weights), 2 * product + same_size_flops(x, [shapes[1], shapes[3]]))
    return Pass((x, *weights, out), product), backward


def block(x: Tensor, shapes: Sequence[Sequence[int]], *, packed: bool) -> Cost:
    """The 1x1 convolutions of x as one, the two of what they reduced (with packed weights: the engine's), the pool and
    its projection: x is read by the first and by the pool."""
    between = pixels(x) * (shapes[1][0] + shapes[3][0] + x.size(1)) * x.element_size()
    costs = []
    for shape in (shapes[2], shapes[4]) if packed else ():
        reduced = x.new_empty((x.size(0), shape[1], *x.shape[2:]), device="meta")
        costs.append(engine_conv(reduced, shape, (1, 1), (shape[2] // 2,) * 2, (1, 1))[1])
    return Cost(
        5,
        {"x": 2, "packed": 0},
        reads_more=sum(cost.reads_more for cost in costs),
        scratch=between,
        flops_saved=sum(cost.flops_saved for cost in costs),
    )


def fwd_cost(args: Arguments, out: Tensor) -> Cost:
    x, weights = args["x"], args["weights"]
    shapes = [weight.shape for weight in weights]
    # On the CPU weights are packed at every call, where the image is worth it (csrc/inception/cpu.cpp: kWorthPacking).
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() >= 512 * x.size(1):
        cost = block(x, shapes, packed=True)
        return replace(cost, launches=6, reads_more=0, scratch=cost.scratch + sum(map(tensor_bytes, weights)))
    # Six of PyTorch's convolutions with an epilogue each, the pool, and a copy of every branch into its slice.
    return replace(block(x, shapes, packed=False), launches=17, rewrites=2)


def packed_cost(args: Arguments, out: Tensor) -> Cost:
    x, weights = args["x"], args["packed"]
    shapes = weight_shapes(x.size(1), args["channels"], args["kernels"])
    if x.device.type == "cuda":
        return replace(block(x, shapes, packed=False), reads={"x": 2})
    cost = block(x, shapes, packed=True)
    pointwise = tensor_bytes(weights[0]) + tensor_bytes(weights[3])  # of one form only
    return replace(cost, reads_more=cost.reads_more + pointwise)


COSTS = {"inception_fwd": fwd_cost, "inception_pack": one_pass, "inception_packed_fwd": packed_cost}
CASES = OpCases(
    inception,
    layers(REAL, ODD),
    make,
    least,
    rounding=8,
    summation=16,
    reason="two convolutions in a row, each with the free summation order and the single rounding of conv_bias_relu",
)
