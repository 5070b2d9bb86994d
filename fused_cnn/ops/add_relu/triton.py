"""add_relu in Triton: reads two tensors and writes one, one block of adjacent elements per program, 16-byte accesses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._layout import empty_nchw
from .._triton import Shipped, dense_like, grid_1d, relu, relu_grad

BLOCK = 2048
NUM_WARPS = 8


@triton.jit
def load(ptr, i, n, WHOLE: tl.constexpr):
    return tl.load(ptr + i) if WHOLE else tl.load(ptr + i, mask=i < n)


@triton.jit
def store(ptr, i, n, values, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(ptr + i, values.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + i, values.to(ptr.dtype.element_ty), mask=i < n)


@triton.jit
def add_relu_block(x_ptr, residual_ptr, out_ptr, i, n, WHOLE: tl.constexpr):
    x = load(x_ptr, i, n, WHOLE).to(tl.float32)
    store(out_ptr, i, n, relu(x + load(residual_ptr, i, n, WHOLE).to(tl.float32)), WHOLE)


@triton.jit
def relu_grad_block(grad_out_ptr, out_ptr, grad_ptr, i, n, WHOLE: tl.constexpr):
    out = load(out_ptr, i, n, WHOLE).to(tl.float32)
    store(grad_ptr, i, n, relu_grad(load(grad_out_ptr, i, n, WHOLE), out), WHOLE)


# A mask keeps Triton from 16-byte accesses unless it knows that n is a multiple of 16, so whole blocks go without.
@triton.jit
def add_relu_fwd_kernel(x_ptr, residual_ptr, out_ptr, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        add_relu_block(x_ptr, residual_ptr, out_ptr, i, n, True)
    else:
        add_relu_block(x_ptr, residual_ptr, out_ptr, i, n, False)


@triton.jit
def add_relu_bwd_kernel(grad_out_ptr, out_ptr, grad_ptr, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        relu_grad_block(grad_out_ptr, out_ptr, grad_ptr, i, n, True)
    else:
        relu_grad_block(grad_out_ptr, out_ptr, grad_ptr, i, n, False)


SHIPPED = [
    Shipped(kernel, pointers, ("n",), constants={"BLOCK": BLOCK}, num_warps=NUM_WARPS)
    for kernel, pointers in (
        (add_relu_fwd_kernel, ("x_ptr", "residual_ptr", "out_ptr")),
        (add_relu_bwd_kernel, ("grad_out_ptr", "out_ptr", "grad_ptr")),
    )
]


def _launch(kernel: triton.JITFunction, a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    out = empty_nchw(like, *like.shape[1:])
    if out.numel() > 0:
        with torch.cuda.device_of(out):
            kernel[grid_1d(out.numel(), BLOCK)](
                dense_like(a, like), dense_like(b, like), out, out.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    return out


def add_relu_fwd(x: Tensor, residual: Tensor) -> Tensor:
    return _launch(add_relu_fwd_kernel, x, residual, x)


def add_relu_bwd(grad_out: Tensor, out: Tensor) -> Tensor:
    return _launch(add_relu_bwd_kernel, grad_out, out, out)
