"""Hopper's convolutions of our own (csrc/cuda/gemm/sm90a_sliding.cuh, sm90a_split.cuh) by tests/simt's stand-in for its
tensor cores, in whole numbers: sums are exact in any order, so results are equal to the bit."""

import ctypes
from collections.abc import Iterator
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
SLIDING, SPLIT = 6, 7  # TileKind
COPIES, PRODUCTS = 0, 1
# x, outputs, kernel, stride, padding, dilation; what each is for.
CASES: dict[str, tuple[tuple[int, ...], int, Any, int, Any, int]] = {
    "units that do not fill a step": ((1, 8, 5, 6), 8, 3, 1, 1, 1),
    "several tiles, chunks of unequal units, ragged outputs": ((2, 72, 11, 13), 72, 3, 1, 1, 1),
    "a tap a step": ((1, 120, 5, 9), 72, 3, 1, 1, 1),
    "several tiles for a block": ((1, 72, 15, 60), 136, 3, 1, 1, 1),
    "several tiles for a block, in one buffer": ((1, 72, 3, 200), 136, 3, 1, 1, 1),
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


def with_each_tile(library: ctypes.CDLL, work: Any) -> Iterator[tuple[_library.Tile, Tensor]]:
    """What `work` gives with each of the kernels' tiles for each problem of it that they may run."""
    used = ctypes.c_int.in_dll(library, "simt_gemm_tile")
    problems = _library.problems_of(library, work)
    tiles = {tile for problem in problems for tile in _library.tiles_of(library, problem)}
    for tile in sorted(tile for tile in tiles if tile[0] in (SLIDING, SPLIT)):
        chosen = [problem for problem in problems if tile in _library.tiles_of(library, problem)]
        try:
            for problem in chosen:
                _library.choose_tile(library, problem, tile)
            used.value = -1
            found = work()
            assert used.value != -1
            yield tile, found
        finally:
            for problem in chosen:
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
        found = list(with_each_tile(library, work))
        assert len(found) == (5 if stride == 1 and kernel != (1, 1) else 2)
        assert [tile for tile, out in found if not torch.equal(out, expected)] == []
    if name.startswith("several tiles"):
        assert ctypes.c_int.in_dll(library, "simt_sliding_buffers").value == (1 if "one buffer" in name else 2)


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


def test_they_write_into_the_slices_of_a_block(library: ctypes.CDLL) -> None:
    torch.manual_seed(0)
    shapes = weight_shapes(16, (8, 16, 40, 8, 24, 8), (3, 5))
    weights, biases = [whole(1, *s).half() for s in shapes], [whole(4, s[0]).half() for s in shapes]
    x = last(whole(1, 2, 16, 7, 9).half())
    expected = inception(x, weights, biases, backend="reference")
    found = list(with_each_tile(library, lambda: inception(x, weights, biases, backend="simt")))
    assert len(found) == 5 and all(torch.equal(out, expected) for _, out in found)


def test_pixels_that_shared_memory_does_not_hold_are_the_librarys(library: ctypes.CDLL) -> None:
    x, weight = last(whole(1, 1, 8, 3, 2500).half()), whole(1, 8, 8, 3, 3).half()
    used = ctypes.c_int.in_dll(library, "simt_gemm_tile")

    def work() -> Tensor:
        return conv_bias_relu(x, weight, padding=3, dilation=3, backend="simt")

    (problem,) = _library.problems_of(library, work)
    _library.choose_tile(library, problem, (SLIDING, 256, 64, 64))
    used.value = -1
    found = work()
    _library.choose_tile(library, problem, None)
    assert used.value == -1
    expected = torch.relu(F.conv2d(x.float(), weight.float(), padding=3, dilation=3))
    assert torch.equal(found, expected.half())


def test_what_is_not_finite_reaches_the_pixels_that_it_reaches_in_pytorch(library: ctypes.CDLL) -> None:
    x, weight = torch.ones(1, 16, 6, 7), torch.ones(8, 16, 3, 3)
    x[0, 3, 2, 3], x[0, 5, 5, 6] = float("inf"), float("nan")
    expected = torch.relu(F.conv2d(x, weight, padding=1)).half()
    work = lambda: conv_bias_relu(last(x.half()), weight.half(), padding=1, backend="simt")  # noqa: E731
    for _, found in with_each_tile(library, work):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
