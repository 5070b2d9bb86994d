"""The convolutions and residual additions of GoogLeNet and ResNet-50, and awkward shapes and geometry."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from torch import Tensor

from .._cases import Case, Layer, Maker, OpCases, Pass, awkward, layers
from .._conv import empty_result, pair
from .._cost import Arguments, Cost, engine_conv, one_pass, tensor_bytes
from .._flops import conv_flops
from .add_relu import add_relu
from .op import conv1x1_bias_relu, conv_bias_relu
from .stage import GEOMETRY

REAL: list[Layer] = [
    ("googlenet stem 7x7", (1, 3, 224, 224), {"out": 64, "kernel": 7, "stride": 2, "padding": 3}),
    ("googlenet 3a 3x3", (1, 96, 28, 28), {"out": 128, "kernel": 3, "padding": 1}),
    ("googlenet_paper 4a 5x5", (1, 16, 14, 14), {"out": 48, "kernel": 5, "padding": 2}),
    ("resnet50 layer1 conv2", (1, 64, 56, 56), {"out": 64, "kernel": 3, "padding": 1}),
    ("resnet50 layer2 conv2 stride 2", (1, 128, 56, 56), {"out": 128, "kernel": 3, "stride": 2, "padding": 1}),
    ("resnet50 layer4 conv2", (1, 512, 7, 7), {"out": 512, "kernel": 3, "padding": 1}),
    ("resnet18 layer1 conv2", (1, 64, 56, 56), {"out": 64, "kernel": 3, "padding": 1, "residual": True}),
]
ODD: list[Layer] = [
    ("dilated", (2, 8, 14, 14), {"out": 9, "kernel": 3, "padding": 2, "dilation": 2}),
    ("grouped", (2, 8, 7, 7), {"out": 12, "kernel": 3, "padding": 1, "groups": 4}),
    ("oblong", (2, 5, 9, 7), {"out": 6, "kernel": (1, 7), "padding": (0, 3)}),
    ("two strides", (2, 5, 9, 8), {"out": 6, "kernel": (3, 2), "stride": (2, 3), "padding": (1, 0)}),
    ("no bias, linear", (2, 5, 9, 8), {"out": 6, "kernel": 3, "bias": False, "relu": False}),
    ("kernel as large as the input", (2, 5, 4, 4), {"out": 6, "kernel": 4, "residual": True}),
    ("padding wider than the image", (1, 3, 2, 2), {"out": 4, "kernel": 5, "padding": 4}),
]
REAL_1X1: list[Layer] = [
    ("googlenet 3a reduce3x3", (1, 192, 28, 28), {"out": 96}),
    ("googlenet 4a reduce5x5", (1, 480, 14, 14), {"out": 16}),
    ("googlenet 5b branch1", (1, 832, 7, 7), {"out": 384}),
    ("resnet50 layer1 conv1", (1, 256, 56, 56), {"out": 64}),
    ("resnet50 layer1 conv3", (1, 64, 56, 56), {"out": 256, "residual": True}),
    ("resnet50 layer2 downsample", (1, 256, 56, 56), {"out": 512, "stride": 2, "relu": False}),
    ("resnet50 layer3 conv3", (1, 256, 14, 14), {"out": 1024, "residual": True}),
    ("resnet50 layer4 conv3", (1, 512, 7, 7), {"out": 2048, "residual": True}),
]
ODD_1X1: list[Layer] = [
    ("no bias", (2, 17, 7, 7), {"out": 3, "bias": False}),
    ("stride 2, residual", (2, 33, 9, 7), {"out": 65, "stride": 2, "residual": True}),
    ("linear", (1, 3, 5, 5), {"out": 1, "relu": False}),
    ("stride past the end", (2, 5, 1, 6), {"out": 7, "stride": 3}),
]
ADDED: list[Layer] = [
    ("resnet50 layer1", (1, 256, 56, 56), {}),
    ("resnet50 layer2", (1, 512, 28, 28), {}),
    ("resnet50 layer3", (1, 1024, 14, 14), {}),
    ("resnet50 layer4", (1, 2048, 7, 7), {}),
]


def make(case: Case, maker: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    o = case.options
    x = maker.activation(*case.shape)
    weight = maker.weight(o["out"], case.shape[1] // o.get("groups", 1), *pair(o.get("kernel", 1)))
    bias = maker.vector(o["out"]) if o.get("bias", True) else None
    geometry = (pair(o.get(name, default)) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)))
    out = empty_result(x.to("meta"), weight.shape, *geometry)
    residual = maker.activation(*out.shape) if o.get("residual") else None
    names = ("stride", "padding", "dilation", "groups", "relu")
    return (x, weight, bias, residual), {k: o[k] for k in names if k in o}


def least(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *, relu: bool = True, **_: Any
) -> tuple[Pass, Pass]:
    """A stride that is larger than the kernel leaves pixels unread, but their gradient is written, too."""
    (height, width), (kh, kw) = out.shape[2:], weight.shape[2:]
    read = x[:, :, : height * kh, : width * kw]
    flops = conv_flops(out, weight.shape)
    forward = Pass((read, weight, residual, out), flops)
    return forward, Pass((out, out if relu else None, read, weight, x, weight, residual), 2 * flops)


def make_add(case: Case, maker: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (maker.activation(*case.shape), maker.activation(*case.shape)), {}


def least_add(out: Tensor, x: Tensor, residual: Tensor) -> tuple[Pass, Pass]:
    """Backward reads the gradient and the result, and writes one gradient that both inputs share."""
    return Pass((x, residual, out), 2 * out.numel()), Pass((out, out, x), out.numel())


def fwd_cost(args: Arguments, out: Tensor) -> Cost:
    """PyTorch's convolution, then the epilogue over its result."""
    return Cost(2, rewrites=1)


def bwd_cost(args: Arguments, grads: Sequence[Tensor]) -> Cost:
    """One pass masks grad_out and sums grad_bias; then PyTorch's kernels make a gradient each from what it wrote."""
    mask = args["out"] is not None or args["needs_bias"]
    kernels = args["needs_x"] + args["needs_weight"]
    reads = {"grad_out": mask + kernels, "x": int(args["needs_weight"]), "weight": int(args["needs_x"])}
    return Cost(mask + kernels, reads)


def packed_cost(args: Arguments, out: Tensor) -> Cost:
    return engine_conv(args["x"], args["weight_shape"], args["stride"], args["padding"], args["dilation"])[1]


def stage_cost(args: Arguments, out: Tensor) -> Cost:
    """One convolution after the other. x is read by the first and by the first shortcut. What one block hands to the
    next stays inside, as what lies between the convolutions does, and is read again by the next block's shortcut. On a
    CPU a projection is written where the result goes, and read there by the block's last convolution."""
    x, geometry, lengths, projects = (args[name] for name in ("x", "geometry", "lengths", "projects"))
    convolutions = [geometry[i : i + GEOMETRY] for i in range(0, len(geometry), GEOMETRY)]
    on_gpu = x.device.type == "cuda"

    def run(read: Tensor, conv: Sequence[int], in_place: bool = False) -> tuple[Tensor, Cost]:
        channels, out_channels, kh, kw, *pairs = conv
        shape, window = (out_channels, channels, kh, kw), (pairs[:2], pairs[2:4], pairs[4:])
        if on_gpu:
            return empty_result(read.to("meta"), shape, *window), Cost()
        return engine_conv(read, shape, *window, in_place=in_place)

    projected = [run(x, convolutions[-1])] if projects else []
    made, costs = [x], [cost for _, cost in projected]
    for i, conv in enumerate(convolutions[:-1] if projects else convolutions, 1):
        result, cost = run(made[-1], conv, in_place=projects and i == lengths[0])
        made.append(result)
        costs.append(cost)
    handed_on = [made[i] for i in accumulate(lengths[:-1])]
    between = [*made[1:-1], *(result for result, _ in projected if on_gpu)]
    return Cost(
        len(convolutions),
        {"packed": int(on_gpu), "x": 1 + args["shortcut"]},
        reads_more=sum(cost.reads_more for cost in costs) + sum(map(tensor_bytes, handed_on)),
        rewrites=int(projects and not on_gpu),
        scratch=sum(map(tensor_bytes, between)),
        flops_saved=sum(cost.flops_saved for cost in costs),
    )


COSTS = {
    "conv_bias_relu_fwd": fwd_cost,
    "conv_bias_relu_bwd": bwd_cost,
    "conv_bias_relu_pack": one_pass,
    "conv_bias_relu_packed_fwd": packed_cost,
    "residual_stage_packed_fwd": stage_cost,
    "add_relu_fwd": one_pass,
    "add_relu_bwd": one_pass,
}


REASON = (
    "bias and residual are added before the one rounding where eager rounds after each step; a sum over thousands of "
    "products in one accumulator loses more than eager's blocked one"
)
convolution = partial(OpCases, make=make, least=least, rounding=4, summation=16, reason=REASON)
CASES = [
    convolution(conv_bias_relu, (*layers(REAL, ODD), *awkward(out=19, residual=True, kernel=3, padding=1))),
    convolution(
        conv1x1_bias_relu,
        (*layers(REAL_1X1, ODD_1X1), *awkward(out=19, residual=True)),
        registered="conv_bias_relu_fwd",
    ),
    OpCases(
        add_relu,
        (*layers(ADDED), *awkward()),
        make_add,
        least_add,
        rounding=1,
        reason="one addition, rounded once, as eager's: they agree to the bit where both add in float32",
    ),
]
