"""batch_norm on layers of ResNet-50 and GoogLeNet and on awkward shapes, with the batch's statistics and with running
ones."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from .._cases import Case, Layer, Maker, OpCases, Pass, awkward, layers
from .._cost import Arguments, Cost, one_pass
from .args import BatchNormArgs
from .op import bn_add_relu, bn_relu, bn_relu_concat

RESNET: list[Layer] = [
    ("resnet50 conv1", (1, 64, 112, 112), {}),
    ("resnet50 layer1 conv2", (1, 64, 56, 56), {}),
    ("resnet50 layer2 conv2", (1, 128, 28, 28), {}),
    ("resnet50 layer3 conv2", (1, 256, 14, 14), {}),
    ("resnet50 layer4 conv2", (2, 512, 7, 7), {}),
]
RESNET_ENDS: list[Layer] = [
    ("resnet50 layer1", (1, 256, 56, 56), {}),
    ("resnet50 layer2", (1, 512, 28, 28), {}),
    ("resnet50 layer3", (1, 1024, 14, 14), {}),
    ("resnet50 layer4", (2, 2048, 7, 7), {}),
]
ODD: list[Layer] = [("linear", (2, 24, 7, 7), {"relu": False}), ("not affine", (2, 24, 7, 7), {"affine": False})]
GOOGLENET = [
    ("googlenet 3a", (64, 128, 32, 32), 28),
    ("googlenet 4a", (192, 208, 48, 64), 14),
    ("googlenet 4d", (112, 288, 64, 64), 14),
    ("googlenet 5b", (384, 384, 128, 128), 7),
]
BRANCHES: list[Layer] = [
    ("odd branches", (2, 22, 7, 5), {"channels": (1, 3, 17, 1)}),
    ("an empty batch", (0, 20, 7, 5), {"channels": (3, 17)}),
]
REASON = (
    "the result is rounded to the dtype once, as eager's last step is; the sums behind statistics and gradients are "
    "float32 in another order than eager's, which moves what cancels by a unit or two"
)


def batch_norm_args(maker: Maker, channels: int, *, training: bool, affine: bool = True) -> BatchNormArgs:
    """A layer's arguments, none of them trivial; parameters float32 beside 16-bit activations, as in mixed-precision
    training."""
    mean, var = maker.buffer(channels, low=-1, high=1), maker.buffer(channels, low=0.5, high=2)
    weight = maker.vector(channels, mean=1, std=0.5, dtype=mean.dtype) if affine else None
    bias = maker.vector(channels, std=0.5, dtype=mean.dtype) if affine else None
    return BatchNormArgs(weight, bias, mean, var, training, 0.1, 1e-3)


def in_both_modes(cases: Iterable[Case]) -> Iterator[Case]:
    """The cases in training and in eval; one value per channel has no variance, and of two the gradient is all
    cancellation."""
    for case in cases:
        n, _, h, w = case.shape
        for training in (True, False) if n * h * w == 0 or n * h * w > 2 else (False,):
            name = f"{case.name} {'training' if training else 'eval'}"
            yield replace(case, name=name, options={"training": training, **case.options})


def make_bn_relu(case: Case, maker: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    o = case.options
    args = batch_norm_args(maker, case.shape[1], training=o["training"], affine=o.get("affine", True))
    return (maker.activation(*case.shape), args), {"relu": o.get("relu", True)}


def make_bn_add_relu(case: Case, maker: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    channels, training = case.shape[1], case.options["training"]
    x, residual = maker.activation(*case.shape), maker.activation(*case.shape)
    bn = batch_norm_args(maker, channels, training=training)
    if not case.options.get("projection"):
        return (x, bn, residual), {}
    return (x, bn, residual, batch_norm_args(maker, channels, training=training)), {}


def make_bn_relu_concat(case: Case, maker: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    n, _, h, w = case.shape
    channels, training = case.options["channels"], case.options["training"]
    modes = training if isinstance(training, tuple) else (training,) * len(channels)
    xs = [maker.activation(n, c, h, w) for c in channels]
    return (xs, [batch_norm_args(maker, c, training=t) for c, t in zip(channels, modes, strict=True)]), {}


BACKWARD_PASSES = 2  # the sums over the batch, then the gradients


def least(
    out: Tensor, xs: Sequence[Tensor], bns: Sequence[BatchNormArgs], residual: Tensor | None = None
) -> tuple[Pass, Pass]:
    """In training the statistics take a pass before the one that normalises."""
    in_training = (x for x, bn in zip(xs, bns, strict=True) if bn.training)
    normalised = sum(x.numel() for x in xs)
    forward = Pass((*in_training, *xs, residual, out), 6 * normalised)
    return forward, Pass((*(out, *xs) * BACKWARD_PASSES, *xs, residual), 12 * normalised)


def least_bn_add_relu(
    out: Tensor, x: Tensor, bn: BatchNormArgs, residual: Tensor, residual_bn: BatchNormArgs | None = None
) -> tuple[Pass, Pass]:
    return least(out, [x], [bn], residual) if residual_bn is None else least(out, [x, residual], [bn, residual_bn])


def bwd_cost(args: Arguments, grads: Any) -> Cost:
    return Cost(BACKWARD_PASSES, dict.fromkeys(("grad_out", "x", "xs", "residual", "mask"), BACKWARD_PASSES))


COSTS = {
    **dict.fromkeys(("bn_stats", "bn_relu_concat_fwd", "bn_add_relu_fwd"), one_pass),
    **dict.fromkeys(("bn_relu_concat_bwd", "bn_add_relu_bwd"), bwd_cost),
}


op_cases = partial(OpCases, rounding=8, reason=REASON)
DOWNSAMPLE: list[Layer] = [(f"{name} downsample", shape, {"projection": True}) for name, shape, _ in RESNET_ENDS]
INCEPTIONS: list[Layer] = [(name, (2, sum(cs), s, s), {"channels": cs}) for name, cs, s in GOOGLENET]
CASES = [
    op_cases(
        bn_relu,
        [*in_both_modes((*layers(RESNET, ODD), *awkward()))],
        make_bn_relu,
        lambda out, x, bn, relu: least(out, [x], [bn]),
        registered="bn_relu_concat_fwd",
    ),
    op_cases(
        bn_add_relu,
        [*in_both_modes((*layers((*RESNET_ENDS, *DOWNSAMPLE)), *awkward(), *awkward(projection=True)))],
        make_bn_add_relu,
        least_bn_add_relu,
    ),
    op_cases(
        bn_relu_concat,
        (
            *in_both_modes(layers(INCEPTIONS, BRANCHES)),
            Case("one branch frozen", (2, 24, 7, 7), {"channels": (3, 16, 5), "training": (True, False, True)}),
        ),
        make_bn_relu_concat,
        least,
    ),
]
