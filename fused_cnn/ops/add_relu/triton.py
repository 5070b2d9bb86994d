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
def add_relu_fwd_kernel(x_ptr, residual_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask).to(tl.float32)
    residual = tl.load(residual_ptr + i, mask=mask).to(tl.float32)
    tl.store(out_ptr + i, relu(x + residual).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_relu_bwd_kernel(grad_out_ptr, out_ptr, grad_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    grad_out = tl.load(grad_out_ptr + i, mask=mask)
    out = tl.load(out_ptr + i, mask=mask).to(tl.float32)
    tl.store(grad_ptr + i, relu_grad(grad_out, out).to(grad_ptr.dtype.element_ty), mask=mask)


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
