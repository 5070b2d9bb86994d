"""batch_norm: bn_relu, bn_add_relu and bn_relu_concat, in training with the batch's statistics and in eval with the
running ones.

y = (x - mean) / sqrt(var + eps) * weight + bias, then the residual, ReLU and the place in the concatenation, in the
same pass. Forward in training reads each x twice (statistics, then the rest) and writes the result once. Backward reads
each x and the gradient twice and writes each gradient once: the normalised values and ReLU's mask are computed again
from x, or come from one bit an element.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._candidates import REFERENCE, TRITON, Candidate, Measurement, offer, resolve, tunable
from ..._checks import check_branches, check_nchw, check_parameter, check_same, check_vector, vector_dtype
from ..._layout import empty_nchw
from ..._library import define, define_triton, kernel
from .._autograd import kernel_or, needs_grad, on_a_backend
from . import reference
from .args import BatchNormArgs
from .statistics import split_channels, statistics


def _fake_stats(xs: list[Tensor], eps: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    mean = xs[0].new_empty(sum(x.size(1) for x in xs), dtype=vector_dtype(xs[0]))
    return mean, torch.empty_like(mean), torch.empty_like(mean)


def _fake_concat_fwd(xs: list[Tensor], *unused: Any) -> Tensor:
    return empty_nchw(xs[0], sum(x.size(1) for x in xs), *xs[0].shape[2:])


def _fake_concat_bwd(
    grad_out: Tensor, xs: list[Tensor], mean: Tensor, *unused: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    return [empty_nchw(x, *x.shape[1:]) for x in xs], torch.empty_like(mean), torch.empty_like(mean)


def _fake_add_fwd(
    x: Tensor,
    residual: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    rows = n * h * w if save_mask and len(weights) == 1 else 0
    return empty_nchw(x, c, h, w), x.new_empty((rows, (c + 7) // 8), dtype=torch.uint8)


def _fake_add_bwd(
    grad_out: Tensor, x: Tensor, residual: Tensor | None, mask: Tensor | None, mean: Tensor, *unused: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = empty_nchw(x, *x.shape[1:])
    return grad, torch.empty_like(grad), torch.empty_like(mean), torch.empty_like(mean)


# Vectors (mean, rstd, weights, biases, their gradients) are float32, or float64 for float64 activations; mean and rstd
# hold all inputs' channels in order. bn_stats also returns the unbiased variance. bn_add_relu normalises the residual
# too where there are two weights; where there is one, `mask` is uint8 (N * H * W, ceil(C / 8)), bit c % 8 of byte c //
# 8 set where out > 0 or NaN.
define("bn_stats(Tensor[] xs, float[] eps) -> (Tensor mean, Tensor rstd, Tensor var)", _fake_stats)
define(
    "bn_relu_concat_fwd(Tensor[] xs, Tensor mean, Tensor rstd, Tensor[] weights, Tensor[] biases, bool relu) -> Tensor",
    _fake_concat_fwd,
)
define(
    "bn_relu_concat_bwd(Tensor grad_out, Tensor[] xs, Tensor mean, Tensor rstd, Tensor[] weights, Tensor[] biases, "
    "bool[] training, bool relu) -> (Tensor[] grad_xs, Tensor grad_weight, Tensor grad_bias)",
    _fake_concat_bwd,
)
define(
    "bn_add_relu_fwd(Tensor x, Tensor residual, Tensor mean, Tensor rstd, Tensor[] weights, Tensor[] biases, "
    "bool save_mask) -> (Tensor out, Tensor mask)",
    _fake_add_fwd,
)
define(
    "bn_add_relu_bwd(Tensor grad_out, Tensor x, Tensor? residual, Tensor? mask, Tensor mean, Tensor rstd, "
    "Tensor[] weights, Tensor[] biases, bool[] training) "
    "-> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    _fake_add_bwd,
)
define_triton(
    "batch_norm", "bn_stats", "bn_relu_concat_fwd", "bn_relu_concat_bwd", "bn_add_relu_fwd", "bn_add_relu_bwd"
)

_H200 = ("H200", "2026-11-26")
offer(
    "bn_relu_concat_fwd",
    Candidate(
        "native",
        measured=(
            Measurement("64 at 112 x 112, training, bfloat16, batch 256", "408 us, Triton 778, PyTorch 1354", *_H200),
            Measurement("inception 3a, training, bfloat16, batch 256", "140 us, Triton 448, PyTorch 542", *_H200),
        ),
    ),
    TRITON,
    REFERENCE,
)
offer(
    "bn_add_relu_fwd",
    Candidate(
        "native",
        measured=(
            Measurement("256 at 56 x 56, training, bfloat16, batch 256", "479 us, Triton 926, PyTorch 1323", *_H200),
        ),
    ),
    TRITON,
    REFERENCE,
)


def vectors(xs: Sequence[Tensor], bns: Sequence[BatchNormArgs]) -> list[Tensor]:
    """Every weight, then every bias, in the kernels' dtype; 1 and 0 where there are none."""
    given = [(bn.weight, x, 1.0) for x, bn in zip(xs, bns, strict=True)]
    given += [(bn.bias, x, 0.0) for x, bn in zip(xs, bns, strict=True)]
    return [
        x.new_full((x.size(1),), default, dtype=vector_dtype(x)) if p is None else p.to(vector_dtype(x)).contiguous()
        for p, x, default in given
    ]


class _BNReLUConcat(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, relu: bool, training: tuple[bool, ...], mean: Tensor, rstd: Tensor, *tensors: Tensor
    ) -> Tensor:
        n = len(training)
        ctx.backend, ctx.relu, ctx.training = backend, relu, training
        ctx.save_for_backward(mean, rstd, *tensors)
        xs, weights, biases = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        return kernel("bn_relu_concat_fwd", backend)(xs, mean, rstd, weights, biases, relu)

    @staticmethod
    @on_a_backend
    def backward(ctx: Any, backend: str, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        n = len(ctx.training)
        mean, rstd, *tensors = ctx.saved_tensors
        xs, weights, biases = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        grad_xs, *grads = kernel_or(reference.bn_relu_concat_bwd, "bn_relu_concat_bwd", backend)(
            grad_out, xs, mean, rstd, weights, biases, ctx.training, ctx.relu
        )
        sizes = [x.size(1) for x in xs]
        return (*[None] * 5, *grad_xs, *(part for grad in grads for part in split_channels(grad, sizes)))


class _BNAddReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, training: tuple[bool, ...], *tensors: Tensor) -> Tensor:
        mean, rstd, x, residual, *vectors = tensors
        n = len(training)
        out, mask = kernel("bn_add_relu_fwd", backend)(x, residual, mean, rstd, vectors[:n], vectors[n:], True)
        ctx.backend, ctx.training = backend, training
        # A normalised residual is needed for its own gradient and gives the mask again; a plain one is not needed, its
        # mask is.
        ctx.save_for_backward(mean, rstd, x, residual if n == 2 else mask, *vectors)
        return out

    @staticmethod
    @on_a_backend
    def backward(ctx: Any, backend: str, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        n = len(ctx.training)
        mean, rstd, x, other, *vectors = ctx.saved_tensors
        residual, mask = (other, None) if n == 2 else (None, other)
        grad_x, grad_residual, *grads = kernel_or(reference.bn_add_relu_bwd, "bn_add_relu_bwd", backend)(
            grad_out, x, residual, mask, mean, rstd, vectors[:n], vectors[n:], ctx.training
        )
        parts = (part for grad in grads for part in split_channels(grad, [x.size(1)] * n))
        return (*[None] * 4, grad_x, grad_residual, *parts)


def check_args(op: str, name: str, x: Tensor, bn: BatchNormArgs) -> None:
    """bn's vectors fit x's channels, and it can give statistics."""
    channels = x.size(1)
    check_parameter(op, f"weight{name}", bn.weight, channels, x)
    check_parameter(op, f"bias{name}", bn.bias, channels, x)
    check_vector(op, f"running_mean{name}", bn.running_mean, channels, x)
    check_vector(op, f"running_var{name}", bn.running_var, channels, x)
    if (bn.running_mean is None) != (bn.running_var is None):
        raise ValueError(f"{op}: running_mean{name} and running_var{name} must both be given, or neither")
    if not bn.training and bn.running_mean is None:
        raise ValueError(f"{op}: training=False needs running_mean{name} and running_var{name}, got None")
    if bn.training and x.numel() == channels and channels > 0:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")


@tunable
def bn_relu_concat(
    xs: Sequence[Tensor], bns: Sequence[BatchNormArgs], *, relu: bool = True, backend: str | None = None
) -> Tensor:
    """cat([relu(bn_i(x_i))], dim=1): every branch normalised straight into its channels of the one output.

    The end of a GoogLeNet block with batch normalisation (arXiv 1409.4842, figure 2b; arXiv 1502.03167, algorithms 1
    and 2).

    Args:
        xs: branches (N, C_i, H, W), floating point, any strides, one dtype and device.
        bns: what each branch's normalisation needs; `BatchNormArgs.of(module)` takes it from an nn.BatchNorm2d.
        relu: False leaves the normalised values as they are.
        backend: "reference", "native", "triton", or None for the best at hand.

    Returns:
        (N, sum of C_i, H, W) in the branches' dtype; channels_last where the first branch's channels are adjacent in
        memory, else contiguous.

    Saved for backward: the branches, and two vectors; neither the normalised values nor a mask. Mutated: the running
    statistics of branches in training. Statistics are float32 (float64 for float64).

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not agree; a branch in training has one value per channel.
        BackendUnavailable: an explicit backend cannot run here.
    """
    check_branches("bn_relu_concat", xs)
    if len(bns) != len(xs):
        raise ValueError(f"bn_relu_concat: expected one BatchNormArgs for each of {len(xs)} branches, got {len(bns)}")
    for i, (x, bn) in enumerate(zip(xs, bns, strict=True)):
        check_args("bn_relu_concat", f" of branch {i}", x, bn)
    return normalise(xs, bns, relu, backend)


def normalise(xs: Sequence[Tensor], bns: Sequence[BatchNormArgs], relu: bool, backend: str | None) -> Tensor:
    """bn_relu_concat of arguments that have been checked."""
    backend = resolve("bn_relu_concat_fwd", backend, xs[0])
    if backend == "reference":
        return reference.bn_relu_concat(xs, bns, relu)
    mean, rstd = statistics(xs, bns, backend)
    parameters, n = vectors(xs, bns), len(xs)
    if needs_grad(*xs, *parameters):
        training = tuple(bn.training for bn in bns)
        return _BNReLUConcat.apply(backend, relu, training, mean, rstd, *xs, *parameters)
    return kernel("bn_relu_concat_fwd", backend)(xs, mean, rstd, parameters[:n], parameters[n:], relu)


@tunable
def bn_relu(x: Tensor, bn: BatchNormArgs, *, relu: bool = True, backend: str | None = None) -> Tensor:
    """relu(bn(x)): `bn_relu_concat` of one branch (arXiv 1502.03167, section 3.2: g(BN(Wu)))."""
    check_nchw("bn_relu", "x", x)
    check_args("bn_relu", "", x, bn)
    return normalise([x], [bn], relu, backend)


@tunable
def bn_add_relu(
    x: Tensor,
    bn: BatchNormArgs,
    residual: Tensor,
    residual_bn: BatchNormArgs | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """relu(bn(x) + residual), or relu(bn(x) + residual_bn(residual)): the end of a residual block (arXiv 1512.03385,
    figure 2).

    Args:
        x: (N, C, H, W), floating point, any strides.
        bn: what x's normalisation needs.
        residual: x's shape, dtype and device. Nothing is broadcast.
        residual_bn: what the projection shortcut's normalisation needs (section 3.3, option B); None adds the residual
            as it is.
        backend: "reference", "native", "triton", or None for the best at hand.

    Returns:
        (N, C, H, W) in x's dtype; channels_last where x's channels are adjacent in memory, else contiguous.

    Saved for backward: x, and one bit an element (ReLU's mask) or, with residual_bn, the residual. Mutated: the running
    statistics of what is in training.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not agree; in training there is one value per channel.
        BackendUnavailable: an explicit backend cannot run here.
    """
    check_nchw("bn_add_relu", "x", x)
    check_same("bn_add_relu", "x", x, "residual", residual)
    check_args("bn_add_relu", "", x, bn)
    if residual_bn is not None:
        check_args("bn_add_relu", " of the residual", residual, residual_bn)
    backend = resolve("bn_add_relu_fwd", backend, x)
    if backend == "reference":
        return reference.bn_add_relu(x, bn, residual, residual_bn)
    bns = (bn,) if residual_bn is None else (bn, residual_bn)
    xs = (x, residual)[: len(bns)]
    mean, rstd = statistics(xs, bns, backend)
    parameters, n = vectors(xs, bns), len(bns)
    if needs_grad(x, residual, *parameters):
        return _BNAddReLU.apply(backend, tuple(b.training for b in bns), mean, rstd, x, residual, *parameters)
    return kernel("bn_add_relu_fwd", backend)(x, residual, mean, rstd, parameters[:n], parameters[n:], False)[0]
