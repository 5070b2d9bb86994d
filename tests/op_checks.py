"""What the matrix of all ops and the tests of one room share: cases in an affordable size, packed convolutions, and the
registered ops' calls that public ops and modules make."""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fused_cnn.ops import (
    FoldedConv,
    conv_bias_relu,
    inception,
    pack_conv,
    pack_inception,
    pack_residual_block,
    residual_stage,
)
from fused_cnn.ops._cases import Case, Maker, OpCases
from fused_cnn.ops.plan.op import Kind, Step, encode
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


class Call(NamedTuple):
    """Of a registered op."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recorder(TorchDispatchMode):
    """Keeps every call of a registered op, by the op's name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: defaultdict[str, list[Call]] = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "fused_cnn":
            detached = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs or {}))
            self.calls[func.name()].append(Call(func, *detached))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def call_packed_forms(dtype: torch.dtype) -> None:
    """Calls of the packed forms that modules use, and of a plan with a step of each kind."""
    maker = Maker(dtype)
    x, weight = maker.activation(2, 8, 5, 5), maker.weight(6, 8, 3, 3)
    conv_bias_relu(x, *pack_conv(weight, maker.vector(6), like=x))
    block = pack_residual_block([FoldedConv(weight, None, 2, 1)], FoldedConv(weight, None, 2, 1), shortcut=True, like=x)
    residual_stage(x, block)
    widths = [(3, 8, 1), (4, 8, 1), (5, 4, 3), (2, 8, 1), (3, 2, 3), (4, 8, 1)]
    weights = [maker.weight(o, i, k, k) for o, i, k in widths]
    packed, _ = pack_inception(weights, [maker.vector(w.size(0)) for w in weights], like=x)
    inception(x, packed)
    conv, _ = pack_conv(weight, None, like=x, stride=2)
    steps = [
        Step(Kind.MAX_POOL, (0,), numbers=(3, 3, 1, 1, 1, 1, 1, 1, 0)),
        Step(Kind.CONVOLUTION, (1,), (0, 1), (6, 8, 3, 3, 2, 2, 1, 1, 1, 1, 1)),
        Step(Kind.CONVOLUTION, (1, 2), (0, 1), (6, 8, 3, 3, 2, 2, 1, 1, 1, 1, 0)),
        Step(Kind.STAGE, (1,), (1, 2), (1, 1, 1, 1, *block.geometry)),
        Step(Kind.CONCATENATION, (2, 3, 4)),
        Step(Kind.INCEPTION, (0,), (3, 4), (3, 4, 5, 2, 3, 4, 3, 3)),
        Step(Kind.AVERAGE, (5,)),
    ]
    constants = [conv.data, *block.data, *packed.data]
    arena, seconds = torch.empty(1 << 16, dtype=torch.uint8), torch.zeros(len(steps), dtype=torch.float64)
    outs = torch.ops.fused_cnn.run_plan([x], constants, encode(steps), [6, 7])
    outs = [out.contiguous(memory_format=torch.channels_last) for out in outs]
    torch.ops.fused_cnn.run_plan_into([x], constants, encode(steps), [6, 7], outs, arena, seconds)
