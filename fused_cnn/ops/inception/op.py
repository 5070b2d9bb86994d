"""inception: a whole Inception block in eval form (BatchNorm folded into weights and biases), written into one output.

    out = cat([relu(1x1(x)), relu(3x3(relu(1x1(x)))), relu(kxk(relu(1x1(x)))), relu(1x1(maxpool3x3(x)))], dim=1)

The three 1x1 convolutions that share x are one matrix product, so x is read once for them and once by the pool; every
branch writes straight into its channel slice, so there is no concatenation pass. Backward computes the reductions and
the pool again.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._candidates import (
    REFERENCE,
    TRITON,
    Candidate,
    Measurement,
    best,
    measuring,
    offer,
    refuse_transforms,
    resolve,
    tunable,
)
from ..._checks import check_nchw, check_same, check_vector
from ..._layout import empty_nchw
from ..._library import define, define_triton, kernel, slice_step
from .._autograd import kernel_or, needs_grad, on_a_backend
from .._conv import autocast, runs_on_gpu_kernels, runs_packed
from .._flops import flop_formula
from ..conv import reference as conv_reference
from ..max_pool.op import Pooled
from . import reference

CONVOLUTIONS = ("branch1", "reduce3", "conv3", "reduce5", "conv5", "pool_proj")
OUTPUTS = (0, 2, 4, 5)  # which of them write into the result, in this order
PARALLEL = (0, 1, 3)  # those that read x
POOL = ([3, 3], [1, 1], [1, 1], [1, 1])  # kernel, stride, padding, dilation
aten = torch.ops.aten


def _fake_pack(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    ctx = torch.library.get_ctx()
    return [weights[0].new_empty(ctx.new_dynamic_size(), dtype=torch.uint8) for _ in range(4)]


define(
    "inception_fwd(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor",
    lambda x, weights, biases: empty_nchw(x, sum(weights[i].size(0) for i in OUTPUTS), *x.shape[2:]),
)
define("inception_pack(Tensor[] weights, Tensor[] biases) -> Tensor[]", _fake_pack)
define(
    "inception_packed_fwd(Tensor x, Tensor[] packed, SymInt[] channels, SymInt[] kernels) -> Tensor",
    lambda x, packed, channels, kernels: empty_nchw(x, sum(channels[i] for i in OUTPUTS), *x.shape[2:]),
)
define_triton("inception", "inception_fwd")


def weight_shapes(in_channels: int, channels: Sequence[int], kernels: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Of the six convolutions, in the order of CONVOLUTIONS; `kernels` are those of conv3 and conv5."""
    inputs = (in_channels, in_channels, channels[1], in_channels, channels[3], in_channels)
    sides = (1, 1, kernels[0], 1, kernels[1], 1)
    return [(out, c, side, side) for out, c, side in zip(channels, inputs, sides, strict=True)]


def same_size_flops(x: Tensor, shapes: Sequence[Sequence[int]]) -> int:
    """Of convolutions whose results are as large as x, by their weights' shapes."""
    n, _, height, width = x.shape
    return 2 * n * height * width * sum(map(prod, shapes))


@flop_formula("inception_fwd")
def fwd_flops(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, out_val: Tensor) -> int:
    return same_size_flops(x, [weight.shape for weight in weights])


@flop_formula("inception_packed_fwd")
def packed_flops(
    x: Tensor, packed: Sequence[Tensor], channels: Sequence[int], kernels: Sequence[int], *, out_val: Tensor
) -> int:
    return same_size_flops(x, weight_shapes(x.size(1), channels, kernels))


offer(
    "inception_fwd",
    Candidate(
        "native",
        measured=(
            Measurement("3a, bfloat16, batch 256", "813 us, Triton 957, PyTorch 1090", "H200", "2026-11-26"),
            Measurement("5b, bfloat16, batch 256", "258 us, Triton 464, PyTorch 347", "H200", "2026-11-26"),
        ),
    ),
    TRITON,
    REFERENCE,
)


class PackedInception(NamedTuple):
    """The block's weights and biases as the native kernels read them; good on this machine only. On a CPU four tensors
    of bytes; on a GPU the six weights, channels_last, of which those of one product lie one below the other, and the
    six biases."""

    data: list[Tensor]
    in_channels: int
    channels: tuple[int, ...]
    kernels: tuple[int, int]

    def run(self, x: Tensor) -> Tensor:
        """The block's result, by the native kernels."""
        refuse_transforms("inception with packed weights")
        if measuring.record is not None and x.is_cuda:  # `tune` measures plain weights, whose tiles are the op's
            return inception(x, self.data[:6], self.data[6:])
        if x.dim() == 4 and x.size(1) != self.in_channels:  # a CPU's kernel knows padded bytes alone
            raise RuntimeError(
                f"inception: x has shape {tuple(x.shape)}, but the weights take {self.in_channels} input channels"
            )
        return kernel("inception_packed_fwd", "native")(x, self.data, self.channels, self.kernels)


def pack_inception(
    weights: Sequence[Tensor], biases: Sequence[Tensor], *, like: Tensor, backend: str | None = None
) -> tuple[Sequence[Tensor] | PackedInception, Sequence[Tensor]]:
    """The weights and biases to call inception with many times, without gradients, on inputs of `like`'s dtype and
    device; packed where the native kernels will run, biases included."""
    channels, in_channels = tuple(w.size(0) for w in weights), weights[0].size(1)
    kernels = (weights[2].size(2), weights[4].size(2))
    weights = [w.to(like.dtype) for w in weights]
    packs = runs_packed(like, "inception_packed_fwd", backend)
    if packs and not like.is_cuda:
        return PackedInception(kernel("inception_pack", "native")(weights, biases), in_channels, channels, kernels), ()
    biases = [b.to(like.dtype) for b in biases]
    if runs_on_gpu_kernels(like, "inception_fwd", backend):  # which otherwise copy them at every call
        step = slice_step(like.device) if like.dtype in (torch.float16, torch.bfloat16) else 1
        weights = [w.contiguous(memory_format=torch.channels_last) for w in weights]
        for found, every in ((weights, step), (biases, 1)):
            for i, part in zip(PARALLEL, one_below_the_other([found[i] for i in PARALLEL], every), strict=True):
                found[i] = part
    return (PackedInception([*weights, *biases], in_channels, channels, kernels), ()) if packs else (weights, biases)


def one_below_the_other(parts: Sequence[Tensor], step: int) -> list[Tensor]:
    """Copies of tensors that lie in one memory, each from a multiple of `step` rows on, with zeros between."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + -(-part.size(0) // step) * step)
    whole = parts[0].new_zeros(starts[-2] + parts[-1].size(0), *parts[0].shape[1:])
    places = [whole[start : start + part.size(0)] for start, part in zip(starts, parts, strict=False)]
    for place, part in zip(places, parts, strict=True):
        place.copy_(part)
    return places


class _Inception(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, *parameters: Tensor) -> Tensor:
        out = kernel("inception_fwd", backend)(x, parameters[:6], parameters[6:])
        ctx.save_for_backward(x, out, *parameters)
        ctx.backend = backend
        return out

    @staticmethod
    @on_a_backend
    def backward(ctx: Any, backend: str, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, out, *parameters = ctx.saved_tensors
        weights, biases = parameters[:6], parameters[6:]
        needs_x = ctx.needs_input_grad[1]
        grad_weights: list[Tensor] = [x] * 6
        grad_biases: list[Tensor] = [x] * 6

        convolve = kernel_or(conv_reference.conv_bias_relu, "conv_bias_relu_fwd", backend)
        convolve_bwd = kernel_or(conv_reference.conv_bias_relu_bwd, "conv_bias_relu_bwd", backend)

        def backward(i: int, grad: Tensor, result: Tensor, read: Tensor, needs_read: bool) -> Tensor:
            pad = weights[i].size(2) // 2
            grad_read, grad_weights[i], grad_biases[i], _ = convolve_bwd(
                grad, result, read, weights[i], [1, 1], [pad, pad], [1, 1], 1, needs_read, True, True
            )
            return grad_read

        sizes = [weights[i].size(0) for i in OUTPUTS]
        grad1, grad3, grad5, grad4 = grad_out.split(sizes, 1)
        out1, out3, out5, out4 = out.split(sizes, 1)
        reduced3, reduced5 = (convolve(x, weights[i], biases[i], None, [1, 1], [0, 0], [1, 1], 1, True) for i in (1, 3))
        # The pool on a GPU is PyTorch's own without its int64 indices and, backward, without its atomics; on a CPU
        # neither costs anything.
        ours = x.is_cuda and backend != "reference"
        pools = best("max_pool2d_index_fwd", x.device, x.dtype) if ours else "reference"
        if pools == "reference":
            pooled, indices = aten.max_pool2d_with_indices(x, *POOL)
        else:
            pool = Pooled.of(x, pools, (*POOL, False))
            pooled = pool.out
        grad_x = backward(0, grad1, out1, x, needs_x)
        from3 = backward(1, backward(2, grad3, out3, reduced3, True), reduced3, x, needs_x)
        from5 = backward(3, backward(4, grad5, out5, reduced5, True), reduced5, x, needs_x)
        from_pool = backward(5, grad4, out4, pooled, needs_x)
        if needs_x:
            if pools == "reference":
                from_pool = aten.max_pool2d_with_indices_backward(from_pool, x, *POOL, False, indices)
            else:
                from_pool = pool.gradient(from_pool, pools)
            grad_x = grad_x + from3 + from5 + from_pool
        return (None, grad_x if needs_x else None, *grad_weights, *grad_biases)


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    check_nchw("inception", "x", x)
    if len(weights) != 6 or len(biases) != 6:
        raise ValueError(
            f"inception: weights and biases must be six each ({', '.join(CONVOLUTIONS)}), "
            f"got {len(weights)} and {len(biases)}"
        )
    inputs = (x.size(1), x.size(1), weights[1].size(0), x.size(1), weights[3].size(0), x.size(1))
    for name, weight, bias, channels in zip(CONVOLUTIONS, weights, biases, inputs, strict=True):
        check_same("inception", "x", x, f"weight {name}", weight, shape=False)
        square = weight.dim() == 4 and weight.size(2) == weight.size(3) and weight.size(2) % 2 == 1
        if not square or weight.size(1) != channels or (name not in ("conv3", "conv5") and weight.size(2) != 1):
            kernel_shape = "k, k), k odd" if name in ("conv3", "conv5") else "1, 1)"
            raise ValueError(
                f"inception: weight {name} must have shape (out, {channels}, {kernel_shape}, got {tuple(weight.shape)}"
            )
        check_vector("inception", f"bias {name}", bias, weight.size(0), x)
        check_same("inception", "x", x, f"bias {name}", bias, shape=False)


@tunable
def inception(
    x: Tensor, weights: Sequence[Tensor] | PackedInception, biases: Sequence[Tensor] = (), *, backend: str | None = None
) -> Tensor:
    """A whole Inception block with its 1x1 reductions (arXiv 1409.4842, figure 2b), BatchNorm folded.

    Args:
        x: (N, C, H, W), floating point, any strides.
        weights: six, (out, in, k, k): branch1 1x1, reduce3 1x1, conv3 k x k, reduce5 1x1, conv5 k x k, pool_proj 1x1,
            in x's dtype; odd k, padded by k // 2. Or what pack_inception made of them, biases included.
        biases: six, (out,), x's dtype; none with packed weights.
        backend: "reference", "native", "triton", or None for the best at hand.

    Returns:
        (N, branch1 + conv3 + conv5 + pool_proj channels, H, W) in x's dtype; channels_last where x's channels are
        adjacent.

    Saved for backward: x, the result, weights and biases; what lies between is computed again. Nothing is mutated.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not agree.
        RuntimeError: x does not fit packed weights.
        BackendUnavailable: an explicit backend cannot run here.
    """
    if isinstance(weights, PackedInception):
        return weights.run(x)
    x, *parameters = autocast(x, *weights, *biases)
    weights, biases = parameters[: len(weights)], parameters[len(weights) :]
    _check(x, weights, biases)
    backend = resolve("inception_fwd", backend, x)
    if backend == "reference":
        return reference.inception(x, weights, biases)
    if needs_grad(x, *parameters):
        return _Inception.apply(backend, x, *parameters)
    return kernel("inception_fwd", backend)(x, weights, biases)
