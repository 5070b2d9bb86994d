"""What the matrix of all ops and the tests of one room share: cases in an affordable size, and packed convolutions."""

import torch

from fused_cnn.ops import conv_bias_relu, pack_conv
from fused_cnn.ops._cases import Case, Maker, OpCases
from fused_cnn.testing import all_cases, judge


def small(case: Case, side: int = 14) -> Case:
    """A real layer in the size that tests can afford: same channels, smaller image."""
    n, c, h, w = case.shape
    return Case(case.name, (n, c, min(h, side), min(w, side)), case.options, case.real)


CONVOLUTIONS = [o for o in all_cases() if o.name in ("conv_bias_relu", "conv1x1_bias_relu")]


def check_packed(op_cases: OpCases, case: Case, dtype: torch.dtype, layout: str) -> None:
    """A weight packed once, as modules use it in eval, against the plain convolution in eager and in float64."""
    (x, weight, bias, residual), kwargs = op_cases.make(case, Maker(dtype, layout, grad=False))
    packed, left = pack_conv(
        weight, bias, like=x, **{k: kwargs[k] for k in ("stride", "dilation", "groups") if k in kwargs}
    )
    out = conv_bias_relu(x, packed, left, residual, **kwargs)
    inputs = (x, weight, bias, residual)
    eager = conv_bias_relu(*inputs, **kwargs, backend="reference")
    truth = conv_bias_relu(*(None if t is None else t.double() for t in inputs), **kwargs, backend="reference")
    comparison = judge(
        "out", out, eager, truth, factor=2, rounding=op_cases.rounding, summation=op_cases.summation, dtype=dtype
    )
    assert comparison.ok, (op_cases.name, case.name, dtype, layout, comparison)
    adjacent = x.stride(1) == 1 and x.size(1) > 1
    assert out.is_contiguous(memory_format=torch.channels_last if adjacent else torch.contiguous_format)
