"""What this package's ops, and oneDNN's with fused epilogues, launch, read and write.

Most follow the rule (one kernel, each argument read once, each result written once); the backward passes, the
block ops and the CPU's packing of plain weights do not, and are written out here. The ops' names and
arguments are those of their schemas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from .. import _library
from ..ops._conv import out_size
from .cost import ONE_PASS, Arguments, Cost, tensor_bytes


def _one_pass(args: Arguments) -> Cost:
    return ONE_PASS


def _conv_flops(
    x: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> int:
    """A multiply-add for each weight at each pixel of the result, two operations each."""
    sizes = zip(x.shape[2:], weight_shape[2:], stride, padding, dilation, strict=True)
    pixels = prod(out_size(*side) for side in sizes)
    return 2 * x.size(0) * pixels * prod(weight_shape)


def _geometry(args: Arguments) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    return args["stride"], args.get("padding", (0, 0)), args.get("dilation", (1, 1))


def _packs_each_call(x: Tensor) -> bool:
    # The CPU's own convolution reads packed weights; inception packs plain ones at every call, where the image is worth it
    # (csrc/inception/cpu.cpp: kWorthPacking).
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() >= 512 * x.size(1)


def _conv(args: Arguments) -> Cost:
    x, weight = args["x"], args["weight"]
    flops = _conv_flops(x, weight.shape, *_geometry(args))
    return Cost(2, rewrites=1, flops=flops)  # the library's convolution, then the epilogue over its result


def _packed_bytes(x: Tensor, weight_shape: Sequence[int], *geometry: Sequence[int], in_place: bool = False) -> int:
    # A packed weight may be there in two forms, of which a call reads one.
    out_channels, _, *kernel = weight_shape
    return _library.packed_bytes_read(x.shape, out_channels, kernel, *geometry, bfloat16=x.dtype == torch.bfloat16, in_place=in_place)


def _conv_packed(args: Arguments) -> Cost:
    x, weight_shape, geometry = args["x"], args["weight_shape"], _geometry(args)
    return Cost(reads={"packed": 0}, reads_more=_packed_bytes(x, weight_shape, *geometry), flops=_conv_flops(x, weight_shape, *geometry))


def _conv_backward(args: Arguments) -> Cost:
    # One pass masks grad_out and sums grad_bias; then the library makes each gradient, and reads the masked
    # gradient for it.
    mask = args["out"] is not None or args["needs_bias"]
    kernels = args["needs_x"] + args["needs_weight"]
    reads = {"grad_out": mask + kernels, "x": int(args["needs_weight"]), "weight": int(args["needs_x"])}
    flops = kernels * _conv_flops(args["x"], args["weight"].shape, *_geometry(args))
    return Cost(mask + kernels, reads, flops=flops)


def _mkldnn_conv(args: Arguments) -> Cost:
    return Cost(flops=_conv_flops(args["X"], args["W"].shape, *_geometry(args)))


def _mkldnn_linear(args: Arguments) -> Cost:
    x, weight = args["X"], args["W"]
    return Cost(flops=2 * x.numel() // x.size(-1) * weight.numel())


def _residual_stage(args: Arguments) -> Cost:
    # One convolution after the other. x is read by the first and by the first shortcut; a projection is written where the result goes,
    # and read there by the block's last convolution. What one block hands to the next stays inside, as what lies between the
    # convolutions does. Ten values of geometry a convolution: in and out channels, (h, w) pairs.
    x, geometry, projects = args["x"], args["geometry"], args["projects"]
    convolutions = [geometry[i + 1 : i + 10] for i in range(0, len(geometry), 10)]
    chain = convolutions[:-1] if projects else convolutions
    ends = set(accumulate(args["lengths"]))

    def run(read: Tensor, conv: Sequence[int], in_place: bool = False) -> tuple[Tensor, int, int]:
        out, kernel, *pairs = conv[0], conv[1:3], conv[3:5], conv[5:7], conv[7:9]
        sides = (out_size(*side) for side in zip(read.shape[2:], kernel, *pairs, strict=True))
        shape = (out, read.size(1), *kernel)
        weights = _packed_bytes(read, shape, *pairs, in_place=in_place)
        return read.new_empty((read.size(0), out, *sides), device="meta"), _conv_flops(read, shape, *pairs), weights

    made, work, between, weights, again = x, 0, 0, 0, 0  # again: read by the next block's shortcut, too
    for i, conv in enumerate(chain, 1):
        made, *more = run(made, conv, in_place=projects and i == args["lengths"][0])
        work, weights = work + more[0], weights + more[1]
        between += tensor_bytes(made) if i < len(chain) else 0
        again += tensor_bytes(made) if i < len(chain) and i in ends else 0
    if projects:
        _, *more = run(x, convolutions[-1])
        work, weights = work + more[0], weights + more[1]
    reads = {"packed": 0, **({"x": 2} if args["shortcut"] else {})}
    return Cost(len(convolutions), reads, reads_more=weights + again, rewrites=int(projects), scratch=between, flops=work)


def _inception_of(x: Tensor, channels: Sequence[int], kernels: Sequence[int], packing: int) -> Cost:
    # The 1x1 convolutions of x as one, the two convolutions of what they reduced, the pool and its
    # projection: x is read by the first and by the pool. Channels are in the order branch1, reduce3, conv3,
    # reduce5, conv5, pool_proj.
    _, reduce3, conv3, reduce5, conv5, pool_proj = channels
    pixels = x.numel() // max(1, x.size(1))
    weights = x.size(1) * (channels[0] + reduce3 + reduce5 + pool_proj)
    weights += reduce3 * conv3 * kernels[0] ** 2 + reduce5 * conv5 * kernels[1] ** 2
    between = pixels * (reduce3 + reduce5 + x.size(1)) * x.element_size()
    return Cost(5 + (packing > 0), {"x": 2}, scratch=between + packing, flops=2 * pixels * weights)


def _inception(args: Arguments) -> Cost:
    weights = args["weights"]
    kernels = (weights[2].size(2), weights[4].size(2))
    channels = [w.size(0) for w in weights]
    if _packs_each_call(args["x"]):
        return _inception_of(args["x"], channels, kernels, sum(tensor_bytes(w) for w in weights))
    # Six of the library's convolutions with an epilogue each, the pool, and a copy of every branch into its slice.
    return replace(_inception_of(args["x"], channels, kernels, 0), launches=17, rewrites=2)


def _inception_packed(args: Arguments) -> Cost:
    x, packed, channels = args["x"], args["packed"], args["channels"]
    weights = tensor_bytes(packed[0]) + tensor_bytes(packed[3])  # 1 x 1: in one form only
    for (reduced, out), kernel in zip((channels[1:3], channels[3:5]), args["kernels"], strict=True):
        read = x.new_empty((x.size(0), reduced, *x.shape[2:]), device="meta")
        weights += _packed_bytes(read, (out, reduced, kernel, kernel), (1, 1), (kernel // 2,) * 2, (1, 1))
    cost = _inception_of(x, channels, args["kernels"], 0)
    return replace(cost, reads={**cost.reads, "packed": 0}, reads_more=weights)


def _batch_norm_backward(args: Arguments) -> Cost:
    # The sums over the batch, then the gradients: activations, the gradient and the mask are read by both.
    return Cost(2, {name: 2 for name in ("grad_out", "x", "xs", "residual", "mask")})


FUSED_COSTS: dict[str, Callable[[Arguments], Cost]] = {
    "fused_cnn::add_relu_fwd": _one_pass,
    "fused_cnn::add_relu_bwd": _one_pass,
    "fused_cnn::concat_bias_relu_fwd": _one_pass,
    "fused_cnn::concat_bias_relu_bwd": _one_pass,
    "fused_cnn::bn_stats": _one_pass,
    "fused_cnn::bn_relu_concat_fwd": _one_pass,
    "fused_cnn::bn_relu_concat_bwd": _batch_norm_backward,
    "fused_cnn::bn_add_relu_fwd": _one_pass,
    "fused_cnn::bn_add_relu_bwd": _batch_norm_backward,
    "fused_cnn::conv_bias_relu_fwd": _conv,
    "fused_cnn::conv_bias_relu_bwd": _conv_backward,
    "fused_cnn::conv_bias_relu_pack": _one_pass,
    "fused_cnn::conv_bias_relu_packed_fwd": _conv_packed,
    "fused_cnn::residual_stage_packed_fwd": _residual_stage,
    "fused_cnn::inception_fwd": _inception,
    "fused_cnn::inception_pack": _one_pass,
    "fused_cnn::inception_packed_fwd": _inception_packed,
    "fused_cnn::max_pool2d_fwd": _one_pass,
    "fused_cnn::max_pool2d_bwd": _one_pass,
    "mkldnn::_convolution_pointwise": _mkldnn_conv,
    "mkldnn::_convolution_pointwise_": _mkldnn_conv,
    "mkldnn::_reorder_convolution_weight": _one_pass,
    "mkldnn::_linear_pointwise": _mkldnn_linear,
    "mkldnn::_reorder_linear_weight": _one_pass,
}
