"""Hopper's convolution of our own (csrc/cuda/gemm/sm90a_split.cuh) by tests/simt's stand-in for its tensor cores, in
whole numbers: sums are exact in any order, so results are equal to the bit."""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import simt_backend
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor

from fused_cnn import _first_use, _library
from fused_cnn._trees import mapped
from fused_cnn.ops import conv_bias_relu, inception
from fused_cnn.ops.inception.op import weight_shapes

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="the kernels themselves run here"),
    pytest.mark.usefixtures("checked_memory"),
]
SPLIT = (6, 64, 64, 64)
COPIES, PRODUCTS = 0, 1
# x, outputs, kernel, stride, padding, dilation; what each is for.
CASES: dict[str, tuple[tuple[int, ...], int, Any, int, Any, int]] = {
    "units that do not fill a step": ((1, 8, 5, 6), 8, 3, 1, 1, 1),
    "several tiles, units across taps, ragged outputs": ((2, 72, 11, 13), 72, 3, 1, 1, 1),
    "a tap in two steps": ((1, 120, 5, 9), 72, 3, 1, 1, 1),
    "more tiles than multiprocessors": ((1, 72, 15, 60), 136, 3, 1, 1, 1),
    "no padding": ((2, 24, 9, 7), 40, 3, 1, 0, 1),
    "more padding on one side than a result needs": ((2, 8, 6, 5), 16, 3, 1, 2, 1),
    "images smaller than the window": ((9, 16, 1, 2), 24, 5, 1, 2, 1),
    "a window of one row": ((1, 16, 9, 9), 24, (1, 7), 1, (0, 3), 1),
    "an even window, dilated": ((1, 40, 6, 9), 8, (3, 2), 1, (2, 1), 2),
    "one column": ((3, 8, 70, 1), 8, 3, 1, 1, 1),
    "stride 2": ((2, 24, 9, 8), 40, 3, 2, 1, 1),
    "1x1 over a cluster": ((1, 520, 7, 7), 40, 1, 1, 0, 1),
    "1x1 of stride 2": ((2, 24, 9, 7), 72, 1, 2, 0, 1),
}


@pytest.fixture
def library() -> Iterator[ctypes.CDLL]:
    found = simt_backend.install()
    yield found
    ctypes.c_int.in_dll(found, "simt_late").value = COPIES


def whole(largest: int, *shape: int) -> Tensor:
    return torch.randint(-largest, largest + 1, shape).float()


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def split(library: ctypes.CDLL, work: Callable[[], Tensor]) -> Tensor:
    """What `work` gives with every problem of it that the kernel may run run by it."""
    used = ctypes.c_int.in_dll(library, "simt_gemm_tile")
    problems = [p for p in _library.problems_of(library, work) if SPLIT in _library.tiles_of(library, p)]
    try:
        for problem in problems:
            _library.choose_tile(library, problem, SPLIT)
        used.value = -1
        found = work()
        assert problems and used.value != -1
        return found
    finally:
        for problem in problems:
            _library.choose_tile(library, problem, None)


# A product or a copy that nobody waited for shows where it happens as late as it may, and the other at once.
@pytest.mark.parametrize("late", [COPIES, PRODUCTS], ids=["copies late", "products late"])
@pytest.mark.parametrize("name", CASES)
def test_every_geometry_is_right_to_the_bit(library: ctypes.CDLL, name: str, late: int) -> None:
    size, outputs, kernel, stride, padding, dilation = CASES[name]
    torch.manual_seed(0)
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    dtype = torch.float16 if late == COPIES else torch.bfloat16
    x, weight, bias = whole(1, *size), whole(1, outputs, size[1], *kernel), whole(8, outputs)
    how: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    y = F.conv2d(x, weight, bias, **how)
    residual, wide = whole(8, *y.shape), last(torch.cat([x, x], 1).to(dtype))
    ctypes.c_int.in_dll(library, "simt_late").value = late
    for pixels, added in ((last(x.to(dtype)), None), (wide[:, size[1] :], last(residual.to(dtype)))):

        def work(pixels: Tensor = pixels, added: Tensor | None = added) -> Tensor:
            return conv_bias_relu(pixels, weight.to(dtype), bias.to(dtype), added, **how, backend="simt")

        expected = torch.relu(y if added is None else y + residual).to(dtype)
        assert torch.equal(split(library, work), expected)


def test_the_library_gives_what_the_first_comparison_expects(library: ctypes.CDLL) -> None:
    """Beside the tile that is compared: it rounds to bfloat16 twice."""
    (case,) = (case for case in _first_use.convolutions() if case.op == "inception_fwd")
    arguments = mapped(lambda t: t.bfloat16(), case.arguments, Tensor)
    problems = _library.problems_of(library, lambda: _library.kernel(case.op, "simt")(*arguments))
    try:
        for problem in problems:
            _library.choose_tile(library, problem, _first_use.LIBRARY)
        found = _library.kernel(case.op, "simt")(*arguments)
    finally:
        for problem in problems:
            _library.choose_tile(library, problem, None)
    assert torch.equal(found, case.expected.bfloat16())


def test_it_writes_into_the_slices_of_a_block(library: ctypes.CDLL) -> None:
    torch.manual_seed(0)
    shapes = weight_shapes(16, (8, 16, 40, 8, 24, 8), (3, 5))
    weights, biases = [whole(1, *s).half() for s in shapes], [whole(4, s[0]).half() for s in shapes]
    x = last(whole(1, 2, 16, 7, 9).half())
    expected = inception(x, weights, biases, backend="reference")
    assert torch.equal(split(library, lambda: inception(x, weights, biases, backend="simt")), expected)


def test_what_is_not_finite_reaches_the_pixels_that_it_reaches_in_pytorch(library: ctypes.CDLL) -> None:
    x, weight = torch.ones(1, 16, 6, 7), torch.ones(8, 16, 3, 3)
    x[0, 3, 2, 3], x[0, 5, 5, 6] = float("inf"), float("nan")
    expected = torch.relu(F.conv2d(x, weight, padding=1)).half()
    found = split(library, lambda: conv_bias_relu(last(x.half()), weight.half(), padding=1, backend="simt"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
