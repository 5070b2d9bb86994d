"""conv_bias_relu and add_relu in Triton.

Forward is the implicit GEMM of _triton_conv.py for every kernel size. Backward masks grad_out and sums grad_bias in one
pass, then asks cuDNN for the gradients: 1x1 products in Triton, with the mask in the loads of the first, took 1.1 to
4.2 times as long as PyTorch's operators, on each of eight layers (bfloat16, batch 256, H200, 2026-11-26).
add_relu is one pass over adjacent elements: it reads two tensors and writes one, in blocks of 2048, and reached a
copy's bandwidth (285 us for 290 us of roofline at (256, 256, 56, 56) in bfloat16, H200, 2026-11-26).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._layout import empty_nchw, result_format
from .._conv import on_16_bytes, out_sides
from .._triton import empty_pixels, launch, mask_and_sum, relu, relu_grad
from .._triton_conv import Geometry, conv_forward, weight_rows

ADD_BLOCK = 2048
ADD_WARPS = 8


@triton.jit
def add_relu_block(a_ptr, b_ptr, out_ptr, i, mask, GRAD: tl.constexpr):
    a, b = tl.load(a_ptr + i, mask=mask).to(tl.float32), tl.load(b_ptr + i, mask=mask).to(tl.float32)
    values = relu_grad(a, b) if GRAD else relu(a + b)
    tl.store(out_ptr + i, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_relu_kernel(a_ptr, b_ptr, out_ptr, n, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """out = relu(a + b), or with GRAD a, which is grad_out, where b, forward's result, is positive or NaN."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    # A mask keeps Triton from 16-byte accesses unless it knows that n is a multiple of 16, so whole blocks go without.
    if start + BLOCK <= n:
        add_relu_block(a_ptr, b_ptr, out_ptr, i, None, GRAD)
    else:
        add_relu_block(a_ptr, b_ptr, out_ptr, i, i < n, GRAD)


def _add_relu(a: Tensor, b: Tensor, like: Tensor, grad: bool) -> Tensor:
    out = empty_nchw(like, *like.shape[1:])
    a, b = (t.contiguous(memory_format=result_format(like)) for t in (a, b))
    grid = (triton.cdiv(out.numel(), ADD_BLOCK),)
    launch(add_relu_kernel, grid, a, b, out, out.numel(), GRAD=grad, BLOCK=ADD_BLOCK, num_warps=ADD_WARPS)
    return out


def add_relu_fwd(x: Tensor, residual: Tensor) -> Tensor:
    return _add_relu(x, residual, x, grad=False)


def add_relu_bwd(grad_out: Tensor, out: Tensor) -> Tensor:
    return _add_relu(grad_out, out, out, grad=True)


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
    out = empty_pixels(x, weight.size(0), *out_sides(x, *geometry[:4]))
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
            [out[:, part]],
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
    grad_x = grad_weight = none
    grad, grad_bias = mask_and_sum(grad_out, out, needs_bias)
    if needs_x or needs_weight:
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            *map(on_16_bytes, (grad, x, weight)), None,
            stride, padding, dilation, False, [0, 0], groups, [needs_x, needs_weight, False],
        )  # fmt: skip
    return (
        grad_x.contiguous(memory_format=result_format(x)) if needs_x else none,
        grad_weight.contiguous(memory_format=result_format(weight)) if needs_weight else none,
        grad_bias.to(x.dtype),
        none if out is None else grad.contiguous(memory_format=result_format(out)),
    )
