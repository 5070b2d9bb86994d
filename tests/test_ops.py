"""Every op x case x backend x dtype x layout against float64, and what must hold of every op: gradcheck, compile, reruns."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, backends
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_cnn import _library
from fused_cnn.ops._cases import LAYOUTS, Case, Maker, OpCases
from fused_cnn.testing import all_cases, compare

ALL_CASES = all_cases()

DTYPES = {"native": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
          # Triton's interpreter multiplies bfloat16 bit patterns; on a GPU all three are compiled.
          "triton": (torch.float32, torch.float16) if DEVICE == "cpu" else (torch.float32, torch.float16, torch.bfloat16)}


def small(case: Case) -> Case:
    """A real layer in the size that tests can afford: same channels, smaller image."""
    n, c, h, w = case.shape
    return Case(case.name, (n, c, min(h, 14), min(w, 14)), case.options, case.real)


def every_case() -> list[object]:
    params = []
    for op_cases in ALL_CASES:
        for backend in backends():
            if not _library.has_kernel(registered(op_cases), backend, DEVICE):
                continue
            for case in op_cases.cases:
                for dtype in DTYPES[backend]:
                    for layout in LAYOUTS:
                        name = f"{op_cases.name}-{backend}-{case.name}-{str(dtype)[6:]}-{layout}".replace(" ", "_")
                        params.append(pytest.param(op_cases, small(case), backend, dtype, layout, id=name))
    return params


def registered(op_cases: OpCases) -> str:
    """The registered op that decides whether a backend implements a public one."""
    return op_cases.registered or f"{op_cases.name}_fwd"


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize(("op_cases", "case", "backend", "dtype", "layout"), every_case())
def test_forward_and_backward_agree_with_float64(
    op_cases: OpCases, case: Case, backend: str, dtype: torch.dtype, layout: str
) -> None:
    for comparison in compare(op_cases, case, backend, dtype, layout, DEVICE):
        assert comparison.ok, comparison


def smallest(op_cases: OpCases) -> Case:
    real = [c for c in op_cases.cases if c.shape[0] > 0 and c.shape[1] > 1]
    return min(real, key=lambda c: c.shape[0] * c.shape[1] * c.shape[2] * c.shape[3])


each_op = pytest.mark.parametrize("op_cases", ALL_CASES, ids=lambda o: o.name)


@each_op
def test_gradcheck_in_float64(op_cases: OpCases) -> None:
    args, kwargs = op_cases.make(smallest(op_cases), Maker(torch.float64, device=DEVICE))
    leaves, spec = pytree.tree_flatten((args, kwargs))
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]

    def function(*tensors: Tensor) -> Tensor:
        values = [v.clone() if isinstance(v, Tensor) else v for v in leaves]  # an op may update buffers
        for i, tensor in zip(positions, tensors, strict=True):
            values[i] = tensor
        a, k = pytree.tree_unflatten(values, spec)
        return op_cases.op(*a, **k)

    assert torch.autograd.gradcheck(function, [leaves[i] for i in positions], fast_mode=True)


@each_op
def test_compiles_without_graph_breaks(op_cases: OpCases) -> None:
    def make() -> tuple[tuple, dict]:
        return op_cases.make(smallest(op_cases), Maker(torch.float32, device=DEVICE))

    def run(function: object) -> list[Tensor]:
        args, kwargs = make()
        out = function(args, kwargs)  # type: ignore[operator]
        leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    torch._dynamo.reset()
    compiled = run(torch.compile(lambda a, k: op_cases.op(*a, **k), fullgraph=True, backend="aot_eager"))
    for actual, expected in zip(compiled, run(lambda a, k: op_cases.op(*a, **k)), strict=True):
        torch.testing.assert_close(actual, expected)


@each_op
def test_reruns_are_bitwise_equal(op_cases: OpCases) -> None:
    case = small(next(c for c in op_cases.cases if c.real))

    def run() -> list[Tensor]:
        args, kwargs = op_cases.make(case, Maker(torch.float32, device=DEVICE))
        out = op_cases.op(*args, **kwargs)
        leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@each_op
def test_an_expanded_gradient_gives_the_dense_one(op_cases: OpCases) -> None:
    def grads(dense: bool) -> list[Tensor]:
        args, kwargs = op_cases.make(smallest(op_cases), Maker(torch.float64, device=DEVICE))
        out = op_cases.op(*args, **kwargs)
        ones = torch.ones((), dtype=out.dtype, device=out.device).expand(out.shape)
        leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        return list(torch.autograd.grad(out, leaves, ones.contiguous() if dense else ones))

    for actual, expected in zip(grads(False), grads(True), strict=True):
        assert torch.equal(actual, expected)


@each_op
def test_double_backward_is_right_or_refused(op_cases: OpCases) -> None:
    args, kwargs = op_cases.make(smallest(op_cases), Maker(torch.float64, device=DEVICE))
    leaf = next(t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad)
    (grad,) = torch.autograd.grad(op_cases.op(*args, **kwargs).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_every_registered_op_has_a_native_cpu_kernel() -> None:
    missing = [n for n in _library.op_names() if not _library.has_kernel(n, "native", "cpu")]
    assert not missing
