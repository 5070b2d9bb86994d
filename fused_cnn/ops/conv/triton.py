"""conv_bias_relu in Triton: forward on the shared implicit GEMM; backward mask and grad_bias in one pass, then the library's gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._layout import result_format
from .._conv import on_16_bytes
from .._triton import empty_pixels, mask_and_sum
from .._triton_conv import Geometry, conv_forward, shipped_forward, weight_rows

SHIPPED = shipped_forward()


def conv_bias_relu_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    kernel = (weight.size(2), weight.size(3))
    geometry = Geometry(kernel, tuple(stride), tuple(padding), tuple(dilation))
    out = empty_pixels(x, weight.size(0), *geometry.out(x.size(2), x.size(3)))
    width, columns = weight.size(1), weight.size(0) // groups
    for g in range(groups):  # a slice of the channels to a slice of the channels
        part = slice(g * columns, (g + 1) * columns)
        conv_forward(
            x[:, g * width : (g + 1) * width],
            weight_rows(weight[part]),
            None if bias is None else bias[part],
            None if residual is None else residual[:, part],
            geometry,
            relu,
            [(out[:, part], out.size(1))],
        )
    return out.contiguous(memory_format=result_format(x))


def conv_bias_relu_bwd(
    grad_out: Tensor,
    out: Tensor | None,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = grad_out.new_empty(0)
    grad, grad_bias = mask_and_sum(grad_out, out, needs_bias)
    grad_x = grad_weight = none
    if needs_x or needs_weight:
        found = torch.ops.aten.convolution_backward(
            *map(on_16_bytes, (grad, x, weight)), None, stride, padding, dilation, False, [0, 0], groups, [needs_x, needs_weight, False]
        )
        grad_x = found[0].contiguous(memory_format=result_format(x)) if needs_x else none
        grad_weight = found[1].contiguous(memory_format=result_format(weight)) if needs_weight else none
    return grad_x, grad_weight, grad_bias.to(x.dtype), none if out is None else grad.contiguous(memory_format=result_format(out))
