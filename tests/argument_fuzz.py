"""Calls every registered op of the CPU with arguments that were valid until something was done to them; run as a
process of its own, because what this looks for ends it.

    python tests/argument_fuzz.py LAST EXAMPLES

LAST is a file that always holds the call that is being made. A call may return or raise; where nothing but the layout
of its tensors differs from a valid call's, it must return what that one does. Public ops get strides, offsets and NaN
as well, and must return what the reference does.
"""

import os
import resource
import sys
from collections.abc import Callable, Sequence
from math import inf, nan, prod
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from op_checks import Call, Recorder, call_packed_forms
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_cnn import _library
from fused_cnn.ops._cases import Case, Maker, OpCases
from fused_cnn.testing import all_cases, leaves_of, max_error

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
OTHER_DTYPES = (*DTYPES, torch.int64, torch.uint8, torch.bool, torch.complex64)
INTEGERS = (-1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32 + 1, 2**62 + 1, 2**63 - 1, -(2**31), -(2**62), -(2**63))
MOST_BYTES = 4 << 30  # of memory that a call may ask for

Draw = Callable[[st.SearchStrategy[Any]], Any]


def pick(draw: Draw, options: Sequence[Any]) -> Any:
    """One of them; their representations, which st.sampled_from would make, are large."""
    return options[draw(st.integers(0, len(options) - 1))]


def draw_strided(draw: Draw, t: Tensor) -> Tensor:
    """The same values in larger storage: gaps, the dimensions in another order, an offset."""
    strides, reach = [0] * t.dim(), draw(st.integers(1, 2))
    for dim in draw(st.permutations(range(t.dim()))):
        strides[dim] = reach
        reach *= t.size(dim) + draw(st.integers(0, 2))
    offset = draw(st.integers(0, 5))
    return t.new_zeros(offset + reach).as_strided(t.shape, strides, offset).copy_(t)


def draw_special_values(draw: Draw, t: Tensor, values: tuple[float, ...]) -> Tensor:
    if not t.is_floating_point() or t.numel() == 0:
        return t
    t = t.clone()
    for _ in range(draw(st.integers(1, 3))):
        index = tuple(draw(st.integers(0, size - 1)) for size in t.shape)
        t[index] = pick(draw, values)
    return t


def resized(t: Tensor, dim: int, size: int) -> Tensor:
    shape = list(t.shape)
    shape[dim] = size
    return t.new_ones(shape)


def draw_overlapping(draw: Draw, t: Tensor) -> Tensor:
    strides = [draw(st.integers(0, 3)) for _ in t.shape]
    reach = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True) if size > 0)
    return t.new_ones(reach + 3).as_strided(t.shape, strides, draw(st.integers(0, 3)))


def draw_tensor(draw: Draw, t: Tensor | None) -> object:
    """Something else in a tensor's place."""
    if t is None or t.device.type != "cpu" or t.layout != torch.strided or t.numel() > 1 << 20:
        return pick(draw, (None, torch.ones(()), torch.ones(2, 3, 4, 4), torch.ones(6)))
    dim = draw(st.integers(0, max(0, t.dim() - 1)))
    choices: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "dtype": lambda: t.to(pick(draw, OTHER_DTYPES)),
        "meta": lambda: t.to("meta"),
        "sparse": lambda: t.to_sparse(),
        "negative": lambda: torch._neg_view(t) if t.is_floating_point() else t,
        "rank": lambda: pick(draw, (t.unsqueeze(0), t.flatten(), t.new_ones(()))),
        "values": lambda: draw_special_values(draw, t, (nan, inf, -inf, 1e38)),
        "overlapping": lambda: draw_overlapping(draw, t),
        "garbage": lambda: (
            torch.randint(0, 256, (t.numel() * t.itemsize,), dtype=torch.uint8).view(t.dtype).view(t.shape)
        ),
    }
    if t.dim() > 0:
        one = t.narrow(dim, 0, min(1, t.size(dim)))
        choices |= {
            "size": lambda: resized(t, dim, pick(draw, (0, 1, max(0, t.size(dim) - 1), t.size(dim) + 1))),
            "empty and large": lambda: t.new_empty([0, *(pick(draw, (1, 2**10, 2**20)) for _ in t.shape[1:])]),
            "expanded": lambda: one.expand(t.shape),
            "large": lambda: one.expand([2**36 if d == dim else n for d, n in enumerate(t.shape)]),
        }
    return choices[pick(draw, sorted(choices))]()


def draw_list(draw: Draw, values: list[Any], element: Callable[[Any], object]) -> list[Any]:
    values = list(values)
    kind = pick(draw, ("element", "element", "element", "shorter", "longer", "empty", "swapped"))
    if kind == "empty" or not values:
        return []
    i = draw(st.integers(0, len(values) - 1))
    if kind == "element":
        values[i] = element(values[i])
    elif kind == "shorter":
        del values[i]
    elif kind == "longer":
        values.insert(i, values[i])
    else:
        values[0], values[i] = values[i], values[0]
    return values


def draw_other(draw: Draw, value: object) -> object:
    """Something else in an argument's place."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return pick(draw, INTEGERS)
    if isinstance(value, float):
        return pick(draw, (0.0, -1.0, nan, inf, 1e-300))
    if isinstance(value, (list, tuple)):
        return draw_list(draw, list(value), lambda item: draw_other(draw, item))
    return draw_tensor(draw, value)  # type: ignore[arg-type]


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            return f"<{value.layout} {value.dtype} {tuple(value.shape)}>"
        return (
            f"<{value.dtype} {tuple(value.shape)} strides {value.stride()} offset {value.storage_offset()} "
            f"on {value.device}>"
        )
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(describe, value))}]"
    return repr(value)


# Ops with kernels for the CPU.
HERE = [cases for cases in all_cases() if _library.has_kernel(cases.decides, "native", "cpu")]


def recorded() -> dict[str, list[Call]]:
    """Valid calls of every registered op, small ones."""
    with Recorder() as recorder:
        for dtype in DTYPES:
            for op_cases in HERE:
                for case in op_cases.cases:
                    if prod(case.shape) <= 1024:
                        args, kwargs = op_cases.make(case, Maker(dtype))
                        op_cases.op(*args, **kwargs, backend="native").square().sum().backward()
        for dtype in (torch.float32, torch.bfloat16):
            call_packed_forms(dtype)
    here = (name for name in _library.op_names() if _library.has_kernel(name, "native", "cpu"))
    missing = {f"fused_cnn::{name}" for name in here} - set(recorder.calls)
    assert not missing, f"no case calls {sorted(missing)}"
    return recorder.calls


class Fuzz:
    def __init__(self, last: Path) -> None:
        self.last = os.open(last, os.O_WRONLY | os.O_CREAT)
        self.calls = self.refused = 0

    def note(self, what: str) -> None:
        os.pwrite(self.last, what.encode() + b"\n", 0)
        os.ftruncate(self.last, len(what.encode()) + 1)

    def attempt(self, call: Call) -> object:
        """What the call returns, or the exception that it raises."""
        self.note(f"{call.op.name()}({describe(call.args)[1:-1]})")
        self.calls += 1
        try:
            return call.op(*call.args, **call.kwargs)
        except Exception as error:
            self.refused += 1
            return error

    def anything_else(self, draw: Draw, calls: list[Call]) -> None:
        call = pick(draw, calls)
        args = list(call.args)
        for _ in range(draw(st.integers(1, 2))):
            i = draw(st.integers(0, len(args) - 1))
            try:
                args[i] = draw_other(draw, args[i])
            except RuntimeError:  # PyTorch does not make such a tensor
                return
        self.attempt(Call(call.op, tuple(args), call.kwargs))

    def other_layouts(self, draw: Draw, calls: list[Call]) -> None:
        call = pick(draw, calls)

        def other(t: Tensor) -> Tensor:
            packed = t.dtype == torch.uint8 and t.dim() == 1  # whose layout is part of what it is
            return t if packed or t.dim() == 0 else draw_strided(draw, t)

        declared = zip(call.op._schema.arguments, call.args, strict=False)
        args = [  # what is written is given as it must lie
            value if parameter.is_write else pytree.tree_map_only(Tensor, other, value) for parameter, value in declared
        ]
        kwargs = pytree.tree_map_only(Tensor, other, call.kwargs)
        expected = self.attempt(call)
        actual = self.attempt(Call(call.op, tuple(args), kwargs))
        assert not isinstance(expected, Exception), expected
        assert not isinstance(actual, Exception), actual
        for mine, truth in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
            if not isinstance(truth, Tensor):
                assert mine == truth
                continue
            # PyTorch's own convolution, which some ops contain, adds up in another order in another layout. Where the
            # processor has no float16, it rounds float16's partial sums too: up to 8 units of the largest value seen.
            of_partial_sums = {}
            if truth.dtype == torch.float16 and truth.isfinite().any():
                largest = truth[truth.isfinite()].abs().max().item()
                of_partial_sums = {"rtol": 1e-3, "atol": 16 * torch.finfo(truth.dtype).eps * largest}
            torch.testing.assert_close(mine, truth, equal_nan=True, **of_partial_sums)

    def reference(self, draw: Draw, op_cases: OpCases, cases: list[Case]) -> None:
        case, maker = pick(draw, cases), Maker(torch.float32, seed=draw(st.integers(0, 9)))
        special = draw(st.booleans())

        def other(t: Tensor) -> Tensor:
            if special:
                t = draw_special_values(draw, t.detach(), (nan,)).requires_grad_(t.requires_grad)
            return draw_strided(draw, t.detach()).requires_grad_(t.requires_grad) if t.dim() == 4 else t

        given = pytree.tree_map_only(Tensor, other, op_cases.make(case, maker))
        self.note(f"{op_cases.name}({describe(list(given[0]))[1:-1]}, {given[1]})")
        found = []
        for backend in ("native", "reference"):
            args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.clone() if not t.requires_grad else t, given)
            out = op_cases.op(*args, **kwargs, backend=backend)
            found.append([out.detach(), *torch.autograd.grad(out.sum(), leaves_of((args, kwargs)))])
        for mine, truth in zip(*found, strict=True):
            error = max_error(mine, truth.double())
            # As the test of any strides in test_ops.py: sums of a few hundred terms in float32, in another order.
            bound = 1e-4 * max(1.0, truth[truth.isfinite()].abs().max().item() if truth.isfinite().any() else 1.0)
            assert error <= bound, (op_cases.name, case.name, error, bound)


def main(last: Path, examples: int) -> None:
    torch.manual_seed(0)
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # whose shadow is all of the address space
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, resource.RLIM_INFINITY))
    fuzz = Fuzz(last)

    def run(body: Callable[[Draw], None], count: int) -> None:
        @seed(0)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(data=st.data())
        def every(data: st.DataObject) -> None:
            body(lambda strategy: data.conjecture_data.draw(strategy))

        every()

    for calls in recorded().values():
        run(lambda draw, calls=calls: fuzz.anything_else(draw, calls), examples)
        run(lambda draw, calls=calls: fuzz.other_layouts(draw, calls), examples // 10)
    for op_cases in HERE:
        cases = sorted((c for c in op_cases.cases if prod(c.shape) > 0), key=lambda c: prod(c.shape))[:6]
        run(lambda draw, o=op_cases, c=cases: fuzz.reference(draw, o, c), examples // 4)
    print(f"{fuzz.calls} calls, {fuzz.refused} refused")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
