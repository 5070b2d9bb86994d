"""The CUDA kernels, run on this processor over the cases of every other backend, with checked pointers (simt_backend.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import simt_backend
import torch
from conftest import DEVICE

from fused_cnn import _backends, _library
from fused_cnn.ops import add_relu, concat_bias_relu, conv1x1_bias_relu
from fused_cnn.ops._cases import LAYOUTS, Case, OpCases
from fused_cnn.testing import all_cases, compare

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="the kernels themselves run here"),
    pytest.mark.skipif(simt_backend.compiler() is None, reason="g++ is not installed"),
    pytest.mark.usefixtures("checked_memory"),
]
COVERED = [c for c in all_cases() if c.name in sum(simt_backend.ROOMS.values(), ())]
DTYPES = {  # in which layouts: the kernels' paths are a type's with and without vectors, and float32 goes through all of them
    torch.float64: ["channels_last"],
    torch.float32: LAYOUTS,
    torch.float16: ["channels_last", "offset"],
    torch.bfloat16: ["channels_last", "offset"],
}


@pytest.fixture
def checked_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors lie in memory whose bounds the kernels are held to, filled with NaN before anybody writes."""
    library = simt_backend.install()
    monkeypatch.setattr(_backends, "BACKENDS", (*_backends.BACKENDS, "simt"))
    library.simt_install(True)
    yield
    library.simt_install(False)


def affordable(case: Case) -> Case:
    n, c, h, w = case.shape
    return Case(case.name, (n, c, min(h, 7), min(w, 7)) if case.real else case.shape, case.options, case.real)


# Layers of the real nets as they run, and the awkward shapes in every dtype and in other layouts, too.
RUNS = [
    pytest.param(op_cases, affordable(case), dtype, layout, id=f"{op_cases.name}-{case.name}-{str(dtype)[6:]}-{layout}")
    for op_cases in COVERED
    for case in op_cases.cases
    for dtype in ((torch.float32, torch.bfloat16) if case.real else DTYPES)
    for layout in (["channels_last"] if case.real else DTYPES[dtype])
]


@pytest.mark.parametrize(("op_cases", "case", "dtype", "layout"), RUNS)
def test_forward_and_backward_agree_with_float64(op_cases: OpCases, case: Case, dtype: torch.dtype, layout: str) -> None:
    for comparison in compare(op_cases, case, "simt", dtype, layout):
        assert comparison.ok, comparison


def test_the_rooms_are_all_here() -> None:
    simt_backend.install()
    assert {p.parent.name for p in (simt_backend.ROOT / "csrc").glob("*/*.cu")} == set(simt_backend.ROOMS)
    missing = [op for op in _library.op_names() if "pack" not in op and not _library.has_kernel(op, "simt", "cpu")]
    assert all(op.startswith("max_pool2d") for op in missing), missing


def last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(3, 64, 40, 31), (2, 200, 17, 19), (1, 3, 97, 61)], ids=str)
def test_sums_over_many_chunks_of_rows(shape: tuple[int, ...]) -> None:
    x, grad = last(torch.randn(shape)).requires_grad_(), last(torch.randn(shape))
    bias = torch.randn(shape[1], requires_grad=True)
    out = concat_bias_relu([x], bias, backend="simt")
    grads = torch.autograd.grad(out, (x, bias), grad)
    expected = concat_bias_relu([x.double()], bias.double(), backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    for actual, true in zip(grads, torch.autograd.grad(expected, (x, bias), grad.double()), strict=True):
        torch.testing.assert_close(actual, true, rtol=1e-5, atol=1e-4)


def test_more_branches_than_one_launch_takes() -> None:
    xs = [last(torch.randn(2, c, 3, 5)) for c in (8, 4, 0, 16, 4, 8, 12, 4, 24, 8)]
    torch.testing.assert_close(concat_bias_relu(xs, backend="simt"), torch.relu(torch.cat(xs, 1)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 23, 29), (1, 8, 32, 32), (1, 64, 16, 16)], ids=str)
def test_weight_gradients_of_whole_and_of_part_filled_chunks_of_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = last(torch.randn(shape)).to(dtype), torch.randn(40, shape[1], 1, 1).to(dtype).requires_grad_()
    grad = last(torch.randn(shape[0], 40, *shape[2:])).to(dtype)
    (found,) = torch.autograd.grad(conv1x1_bias_relu(x, weight, relu=False, backend="simt"), weight, grad)
    exact = torch.einsum("nkhw,nchw->kc", grad.double(), x.double())[:, :, None, None]
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-4 * exact.abs().max().item())


def test_products_take_what_does_not_lie_on_16_bytes() -> None:
    """Slices of channels, and storage that begins between: copied, and the same result."""
    x, weight, bias = (torch.randn(s).half() for s in ((2, 24, 5, 7), (16, 24, 1, 1), (16,)))
    expected = conv1x1_bias_relu(last(x), weight, bias, backend="simt")
    for offset in (1, 4, 8):
        wide = last(torch.nn.functional.pad(x, (0, 0, 0, 0, offset, 3)))
        moved = torch.cat([weight.new_zeros(offset), weight.flatten()])[offset:].view_as(weight)
        shifted = torch.cat([bias.new_zeros(offset), bias])[offset:]
        found = conv1x1_bias_relu(wide[:, offset : offset + 24], moved, shifted, backend="simt")
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_results_are_bitwise_equal_in_reruns() -> None:
    x, bias = last(torch.randn(2, 24, 33, 9)), torch.randn(24, requires_grad=True)

    def run() -> torch.Tensor:
        return torch.autograd.grad(concat_bias_relu([x], bias, backend="simt").square().sum(), bias)[0]

    first = run()
    assert all(torch.equal(first, run()) for _ in range(3))


# Mistakes that the checks must notice: a room that is run, a file, a piece of it, and what stands there instead.
BREAKS = {
    "an index too far": ("add_relu", "add_relu/cuda.cu", "if (i < n) out[i] =", "if (i <= n) out[i] ="),
    "a tail left out": ("add_relu", "add_relu/cuda.cu", "if (done < n) {", "if (done + 1 < n) {"),
    "a row too many": ("concat_bias_relu", "common/columns.cuh", "if (r < place.end) load(u, r);", "if (r <= place.end) load(u, r);"),
    "a channel too many": ("concat_bias_relu", "common/octet.cuh", "if (j < n) at[j] =", "if (j <= n) at[j] ="),
    "a missing barrier": ("concat_bias_relu", "common/columns.cuh", "= values[j];\n  __syncthreads();", "= values[j];"),
    "a rest of the rows left out": ("conv1x1_bias_relu", "common/gemm/pointwise_conv.cuh", "if (rest > 0) {", "if (rest > 512) {"),
    "pairs of columns in the wrong place": ("conv1x1_bias_relu", "common/gemm/epilogue.cuh", "upper ? kept : got", "upper ? got : kept"),
    "a residual's row too far": ("conv1x1_bias_relu", "common/gemm/epilogue.cuh", "row >= m ||", "row > m ||"),
    "a slice of the product in the wrong place": ("inception", "common/gemm/epilogue.cuh", "column -= slice.columns, slice", "slice"),
    "a channel of the mask left out": ("batch_norm", "batch_norm/cuda_fwd.cu", "j < place.n) byte |=", "j < place.n - 1) byte |="),
}


@pytest.mark.parametrize("name", [*BREAKS, "no mistake"])
def test_a_broken_kernel_is_caught(name: str, tmp_path: Path) -> None:
    found = simt_backend.run_broken(*BREAKS.get(name, ("add_relu", "add_relu/math.h", "#pragma once", "#pragma once")), tmp_path)
    assert found.returncode == 0 and found.stdout.split()[0] == ("caught" if name in BREAKS else "passed"), found.stdout + found.stderr


def test_add_relu_says_where_it_went_wrong() -> None:
    with pytest.raises(RuntimeError, match="must have the shape of x"):
        _library.kernel("add_relu_fwd", "simt")(torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 4))
    assert add_relu(torch.empty(0, 3, 2, 2), torch.empty(0, 3, 2, 2), backend="simt").numel() == 0
