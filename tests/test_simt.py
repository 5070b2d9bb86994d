"""The CUDA kernels, run on this processor over the cases of every other backend, with checked pointers
(simt_backend.py)."""

import ctypes
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import simt_backend
import torch
from conftest import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from fused_cnn import _first_use, _library, _tables, tuning
from fused_cnn._trees import mapped, tensors
from fused_cnn.ops import add_relu, concat_bias_relu, conv1x1_bias_relu, conv_bias_relu, inception, pack_inception, stem
from fused_cnn.ops._cases import LAYOUTS, Case, OpCases
from fused_cnn.ops._conv import IntPair
from fused_cnn.ops.inception.op import weight_shapes
from fused_cnn.testing import all_cases, compare

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="the kernels themselves run here"),
    pytest.mark.usefixtures("checked_memory"),
]
COVERED = [c for c in all_cases() if c.name in sum(simt_backend.ROOMS.values(), ())]
# In which layouts: the kernels' paths are a type's with and without vectors, and float32 goes through all of them.
DTYPES = {
    torch.float64: ["channels_last"],
    torch.float32: LAYOUTS,
    torch.float16: ["channels_last", "offset"],
    torch.bfloat16: ["channels_last", "offset"],
}


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
def test_forward_and_backward_agree_with_float64(
    op_cases: OpCases, case: Case, dtype: torch.dtype, layout: str
) -> None:
    for backward in (True, False) if op_cases.name == "max_pool2d" else (True,):  # two kernels
        for comparison in compare(op_cases, case, "simt", dtype, layout, backward=backward):
            assert comparison.ok, comparison


def test_the_rooms_are_all_here() -> None:
    simt_backend.install()
    assert {p.parent.name for p in (simt_backend.ROOT / "csrc").glob("*/*.cu")} - {"cuda"} == set(simt_backend.ROOMS)
    missing = [op for op in _library.op_names() if "pack" not in op and not _library.has_kernel(op, "simt", "cpu")]
    # A GPU's pool goes by places, and its plans are graphs.
    assert missing == ["max_pool2d_bwd", "run_plan", "run_plan_into"]


def last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def number(file: str, line: str) -> int:
    """A constant of the kernels, from where it stands in its source; # is its place in the line."""
    pattern = re.escape(line).replace(r"\#", r"(\d+)")
    (found,) = re.findall(pattern, (simt_backend.ROOT / "csrc" / file).read_text())
    return int(found)


COLUMNS = "cuda/column_reduction.cuh"
VEC = number("cuda/vector.cuh", "kVec = #;")
TILE = VEC * number(COLUMNS, "kTileVecs = #;")  # channels of a block
BRANCHES = number(COLUMNS, "kBranches = #;")  # of a launch
CHUNK = number(COLUMNS, "size = std::max<int64_t>(#, ")  # the fewest rows of a chunk of them
# Channel tiles times chunks: where they would be more, chunks grow.
BLOCKS = number(COLUMNS, "blocks = ceil_div<int64_t>(#, ")
PARTS = number(COLUMNS, "kReduceWarps = #;")  # of the chunks, when their sums are reduced
# Rows above which the threads of a whole tile go round again: each has at most four in flight.
ROUND = 4 * number(COLUMNS, "kColumnThreads = #;") * VEC // TILE


def around(*edges: int) -> list[int]:
    return [e + d for e in edges for d in (-1, 0, 1)]


LONG = (1,) * (BLOCKS // 8) + (TILE, 33, 20, 12)  # channels of branches that leave eight chunks for all rows
BOUNDARIES: dict[str, tuple[int, Sequence[int]]] = {  # pixels, and channels of each branch
    "channels": (5, (1, *around(VEC, 2 * VEC, 4 * VEC, TILE, 2 * TILE))),
    "channels in vectors of 8": (5, [VEC * i for i in (1, 2, 3, 4, 5, *around(TILE // VEC, 2 * TILE // VEC))]),
    "a list": (5, (4,) * BRANCHES),
    "a list and an empty branch": (5, (*(4,) * BRANCHES, 0)),
    "two lists, an empty branch in the first": (5, (4, 0, 8, *(4,) * (2 * BRANCHES - 3))),
    **{f"{rows} rows": (rows, (3, 40)) for rows in around(CHUNK)},
    **{f"{count} chunks": (count * CHUNK, (33,)) for count in (PARTS - 1, PARTS)},
    "a chunk of one row": (PARTS * CHUNK + 1, (33,)),
    "many chunks": (3 * PARTS * CHUNK - 5, (VEC,)),
    "long chunks": (8 * ROUND + 9, LONG),
}
CASES = {op_cases.name: op_cases for op_cases in COVERED}


@pytest.mark.parametrize(
    ("op", "name"),
    [("concat_bias_relu", name) for name in BOUNDARIES]
    + [("bn_relu_concat", name) for name, (_, channels) in BOUNDARIES.items() if 0 not in channels],  # as in PyTorch
)
def test_rows_and_channels_on_every_boundary(op: str, name: str) -> None:
    pixels, channels = BOUNDARIES[name]
    case = Case(name, (1, sum(channels), 1, pixels), {"channels": channels, "training": True})
    for comparison in compare(CASES[op], case, "simt", torch.float16):
        assert comparison.ok, comparison


@pytest.mark.parametrize("pixels", [PARTS * CHUNK, PARTS * CHUNK + 1, 2 * PARTS * CHUNK])
@pytest.mark.parametrize("projection", [False, True])
def test_sums_with_a_residual_over_many_chunks(projection: bool, pixels: int) -> None:
    case = Case("many chunks", (1, 33, 1, pixels), {"projection": projection, "training": True})
    for comparison in compare(CASES["bn_add_relu"], case, "simt", torch.float32):
        assert comparison.ok, comparison


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


SPLIT = (6, 64, 64, 64)  # the tile that shares a product among blocks
OUTSIDE, OFF = "outside of every tensor", "on a multiple of 16 bytes at another address"
# Mistakes that the checks must notice, by op: a file, a piece of it, what stands there instead, and
# what is said of it.
BREAKS: dict[str, dict[str, tuple[str, str, str, str]]] = {
    "concat_bias_relu": {
        "no mistake": ("shared/relu.h", "#pragma once", "#pragma once", "passed"),
        "vectors where there are none": ("cuda/vector.cuh", "(p) % 16 == 0", "(p) % 2 == 0", OFF),
        "a row too many": (
            "cuda/column_reduction.cuh",
            "if (r < tile.end) load(u, r);",
            "if (r <= tile.end) load(u, r);",
            OUTSIDE,
        ),
        "a channel too many": ("cuda/vector.cuh", "if (j < n) at[j] =", "if (j <= n) at[j] =", OUTSIDE),
        "a missing barrier": (
            "cuda/column_reduction.cuh",
            "= values[j];\n  __syncthreads();",
            "= values[j];",
            "error=",
        ),
    },
    "inception": {
        "a slice of the product in the wrong place": (
            "cuda/gemm/epilogue.cuh",
            "column -= slice.columns;",
            "",
            OUTSIDE,
        ),
        "the weights of a slice between tiles": ("cuda/pointwise.cu", "kernels.cores->slice_step));", "1));", OUTSIDE),
        "the row above a tile that is pooled": (
            "cuda/pooled_pointwise.cu",
            "area.top = row > 0;",
            "area.top = 0;",
            "error=",
        ),
        "a column of the pool left out": (
            "cuda/pooled_pointwise.cu",
            "max_of_words<T>(both, values[3]);",
            "both;",
            "error=",
        ),
        "a stage that is still in use": (
            "cuda/pooled_pointwise.cu",
            "load(memory + (stage == 0 ? s.stages - 1 : stage - 1) * s.stage_bytes);",
            "load(memory + stage * s.stage_bytes);",
            "differ",
        ),
        "a missing barrier before the product of pooled pixels": (
            "cuda/pooled_pointwise.cu",
            "await_copies(s.stages - 2);\n      __syncthreads();",
            "await_copies(s.stages - 2);",
            "differ",
        ),
        "channels behind the last that a stage had before": (
            "cuda/pooled_pointwise.cu",
            "step < kSteps && first + step * kStep < s.inputs;",
            "step < kSteps;",
            "error=",
        ),
        "a branch that begins too early": (
            "cuda/side_streams.cuh",
            "wait(side, main_);",
            "",
            "another stream's access",
        ),
        "a branch that nobody waits for": ("cuda/side_streams.cuh", "wait(main_, used_.back());", "", "not joined"),
    },
    "stem": {
        "the row that two windows share": (
            "cuda/stem.cu",
            "best[j][h] = pairs[j][h];  //",
            "best[j][h] = best[j][h];  //",
            "differ",
        ),
        "rows of x that are still in use": (
            "cuda/stem.cu",
            "constexpr int kRing = 16;",
            "constexpr int kRing = 8;",
            "differ",
        ),
        "results that are still in use": ("cuda/stem.cu", "step % 2 * D::", "step % 1 * D::", "differ"),
        "outputs past the last": ("cuda/stem.cu", "if (first_output + output >= s.outputs) continue;", "", OUTSIDE),
    },
    "max_pool2d": {
        "a column of the window left out": (
            "cuda/max_pool.cu",
            "+ kKernel) best[r]",
            "+ kKernel - 1) best[r]",
            "error=",
        ),
        "a tap of the window left out": (
            "cuda/max_pool.cu",
            "tap < kKernel) best[r]",
            "tap < kKernel - 1) best[r]",
            "error=",
        ),
        "a window that is not looked at": (
            "cuda/max_pool.cu",
            "kKernel - 2) / kStride + 1;",
            "kKernel - 2) / kStride;",
            "grad",
        ),
    },
    "add_relu": {
        "a rest of the elements left out": ("shared/passes.h", "if (rest > 0)", "if (rest > 63)", "error=inf")
    },
    "conv1x1_bias_relu": {
        "pairs of columns in the wrong place": (
            "cuda/gemm/epilogue.cuh",
            "upper ? kept : got",
            "upper ? got : kept",
            "differ",
        ),
        "a residual's row too far": ("cuda/gemm/epilogue.cuh", "row >= m ||", "row > m ||", OUTSIDE),
    },
    "conv_bias_relu": {
        "memory off 16 bytes for cuDNN": (
            "shared/aten_conv.h",
            "% 16 != 0) return",
            "% 1 != 0) return",
            "aten::convolution",
        ),
        "weights that are still on their way": (
            "cuda/gemm/sm90a_split.cuh",
            "await_copies_for_products<kSplitAhead - 1>()",
            "await_copies_for_products<kSplitAhead>()",
            "caught",
        ),
        "weights in a slot that is still read": (
            "cuda/gemm/sm90a_split.cuh",
            "kSplitSlots = kSplitAhead + 2;",
            "kSplitSlots = kSplitAhead + 1;",
            "caught",
        ),
        "rows that begin without their padding": (
            "cuda/gemm/sm90a_split.cuh",
            "* s.stride[0] - s.padding[0] :",
            "* s.stride[0] :",
            "caught",
        ),
        "pixels of another column in the stem": (
            "cuda/gemm/space_to_depth.cuh",
            "x = left + place % 2;",
            "x = left + place / 2;",
            "differ",
        ),
    },
    "bn_add_relu": {
        "a channel of the mask left out": (
            "batch_norm/cuda_fwd.cu",
            "j < tile.n) byte |=",
            "j < tile.n - 1) byte |=",
            "error=",
        )
    },
}


@pytest.mark.parametrize("op", BREAKS)
def test_broken_kernels_are_caught(op: str, tmp_path: Path) -> None:
    found = simt_backend.run_broken(op, {name: how[:3] for name, how in BREAKS[op].items()}, tmp_path)
    for name, (*_, expected) in BREAKS[op].items():
        assert found[name].startswith(("caught", "passed")) and expected in found[name], (name, found[name])


def test_the_table_decides_which_tile_a_product_runs_with(
    checked_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = simt_backend.install()

    def work() -> torch.Tensor:
        return conv1x1_bias_relu(X, W, backend="simt")

    X, W = (last(torch.randn(shape, dtype=torch.float16)) for shape in ((1, 16, 4, 4), (24, 16, 1, 1)))
    (problem,) = _library.problems_of(library, work)
    assert problem[2:] == (16, 24, 16, 0, 1, 1, 1, 1, 1, 0)
    large, small, split, of_library = tiles = _library.tiles_of(library, problem)
    assert (large, small, split, of_library) == ((0, 128, 128, 64), (0, 64, 64, 64), SPLIT, (3, 0, 0, 0))
    assert _library.tiles_of(library, (*problem[:-3], 2, 1, 0)) == [SPLIT, (1, 128, 64, 64), of_library]
    used = ctypes.c_int.in_dll(library, "simt_gemm_tile")

    def tile_of(run: Callable[[], object]) -> _library.Tile:
        used.value = -1
        run()
        return {0: large, 1: small, 5: split, -1: of_library}[used.value]  # places in the stand-in's list

    assert tile_of(work) == small  # for so small a product
    table = _tables.Table()

    def first_wins(variants: dict[_library.Tile, Callable[[], object]], device: torch.device) -> dict[object, float]:
        assert all(tile_of(run) == tile for tile, run in variants.items())
        return {tile: float(i) for i, tile in enumerate(variants)}

    monkeypatch.setattr(tuning, "_seconds", first_wins)
    tuning.measure_tiles(work, X.device, library, table)
    seconds = {str(tile): float(i) for i, tile in enumerate(tiles)}
    assert table.tiles == {(_tables.GEMM, *problem[1:]): {"best": list(large), "seconds": seconds}}
    assert tile_of(work) == large
    with pytest.raises(ValueError, match="no tile"):
        _library.choose_tile(library, problem, (1, 128, 64, 64))
    with pytest.raises(ValueError, match="a tile is"):
        _library.choose_tile(library, problem, (128, 128, 64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a problem has"):
        _library.choose_tile(library, problem[:5], large)

    def interrupted(variants: dict[_library.Tile, Callable[[], object]], device: torch.device) -> dict[object, float]:
        variants[of_library]()
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "_seconds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuning.measure_tiles(work, X.device, library, _tables.Table())
    assert tile_of(work) == small


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "padding", "dilation"),
    [
        *((c, k, 2, p, 1) for c in (1, 2, 3, 4) for k, p in ((7, 3), (8, 0), (3, 1), ((7, 2), (3, 0)), (1, 0))),
        *(
            (c, k, s, p, 1)
            for c in (8, 24)
            for k, s, p in ((3, 1, 1), (3, 2, 1), ((1, 7), 1, (0, 3)), (1, 2, 0), (5, 3, 2))
        ),
        (8, 3, 1, 2, 2),
        (3, 3, 2, 1, 2),  # which the library takes
        (3, 9, 2, 4, 1),  # as this
        (8, 1, 1, 1, 1),  # and this
    ],
    ids=str,
)
def test_convolutions_by_tensor_cores_take_every_geometry(
    channels: int, kernel: IntPair, stride: int, padding: IntPair, dilation: int
) -> None:
    kernel_h, kernel_w = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    images = torch.randn(2, channels, 17, 14, dtype=torch.float16)
    weight = (
        torch.randn(16, channels, kernel_h, kernel_w, dtype=torch.float16) / (channels * kernel_h * kernel_w) ** 0.5
    )
    bias = torch.randn(16, dtype=torch.float16)
    how: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    exact = torch.conv2d(images.double(), weight.double(), bias.double(), **how)
    residual = torch.randn(exact.shape, dtype=torch.float16)
    for x in (images, last(images), torch.cat([images, images], 1)[:, :channels]):
        for added, relu in ((None, True), (residual, True), (last(residual), False)):
            expected = exact if added is None else exact + added.double()
            found = conv_bias_relu(x, weight, bias, added, relu=relu, backend="simt", **how).double()
            # A rounding of the result to float16's eleven bits, and one of the convolution where it is the library's.
            torch.testing.assert_close(found, expected.relu() if relu else expected, rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("padding", [3, (0, 6), (2, 1)], ids=str)
def test_the_stems_kernel_takes_every_padding_and_layout(channels: int, padding: IntPair) -> None:
    library = simt_backend.install()
    weight = torch.randn(72, channels, 7, 7).half() / (49 * channels) ** 0.5
    for size in ((9, 14), (30, 24), (11, 250)):  # the last is wider than a block's tile
        images = torch.randn(2, channels, *size, dtype=torch.float16)
        for x in (images, last(images), torch.cat([last(images)] * 2, 1)[:, :channels]):
            for bias, relu in ((torch.randn(72).half(), True), (None, False)):

                def work(x: Any = x, bias: Any = bias, relu: bool = relu) -> torch.Tensor:
                    return conv_bias_relu(x, weight, bias, stride=2, padding=padding, relu=relu, backend="simt")

                exact = torch.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), 2, padding)
                (problem,) = _library.problems_of(library, work)
                _library.choose_tile(library, problem, (5, 112, 64, 16))
                found = work().double()
                _library.choose_tile(library, problem, None)
                expected = exact.relu() if relu else exact
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)  # one rounding to eleven bits


def test_a_stem_and_its_pool_are_what_the_parts_are_to_the_bit(checked_memory: None) -> None:
    # The order of a sum of 147 products is another: whole numbers do not show it.
    x, weight = (torch.randint(-2, 3, shape).half() for shape in ((2, 3, 33, 30), (16, 3, 7, 7)))
    bias = torch.randint(-9, 9, (16,)).half()
    for pool_padding, ceil_mode in ((1, False), (0, True), (0, False)):
        how: dict[str, Any] = {"pool_padding": pool_padding, "ceil_mode": ceil_mode}
        y = torch.relu(torch.conv2d(x.float(), weight.float(), bias.float(), 2, 3))
        expected = torch.max_pool2d(y, 3, 2, pool_padding, ceil_mode=ceil_mode)
        assert torch.equal(stem(last(x), weight, bias, **how, backend="simt"), expected.half())


POOLED = (7, 256, 128, 64)  # the tile whose kernel pools and projects
BESIDE = (8, 0, 0, 0)  # the way to run a block in which its branches run beside each other
POOL_BEFORE, BLOCK = 2, _library.BLOCK  # in a problem's last place


def last_branch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Callable[[], torch.Tensor]:
    """An Inception block's, of which the others have 24 channels."""
    shapes = weight_shapes(x.size(1), (8, 8, 8, 8, 8, weight.size(0)), (3, 3))
    weights = [*(torch.zeros(shape, dtype=x.dtype) for shape in shapes[:-1]), weight]
    biases = [*(torch.zeros(shape[0], dtype=x.dtype) for shape in shapes[:-1]), bias]
    return lambda: inception(x, weights, biases, backend="simt")[:, 24:]


def pooled_and_projected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    pooled = torch.max_pool2d(x.double(), 3, 1, 1)
    return torch.relu(torch.conv2d(pooled, weight.double(), bias.double()))


@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        *(((2, 16, h, w), 8) for h in (1, 2, 3) for w in (1, 2, 3, 5)),
        ((1, 8, 1, 5), 32),
        ((3, 24, 2, 9), 40),
        ((1, 72, 3, 2), 64),
        ((9, 200, 7, 7), 128),  # several images in a tile, and not in the last
        ((1, 832, 7, 7), 128),
        ((70, 40, 7, 6), 64),  # several tiles of several images for a block
        ((11, 72, 14, 14), 72),  # several tiles of an image for a block
        ((2, 104, 9, 30), 136),  # more outputs than a block has
        ((3, 192, 28, 28), 32),
        ((1, 24, 13, 70), 48),  # tiles beside each other
        ((1, 8, 3, 300), 96),
        ((1, 56, 131, 3), 24),
    ],
    ids=str,
)
def test_a_pool_and_its_projection_are_what_the_parts_are_to_the_bit(shape: tuple[int, ...], outputs: int) -> None:
    # The order of a sum is another: whole numbers do not show it.
    library = simt_backend.install()
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randint(-2, 3, shape).to(dtype)
        weight, bias = (torch.randint(-1, 2, s).to(dtype) for s in ((outputs, shape[1], 1, 1), (outputs,)))
        work = last_branch(last(x), weight, bias)
        *_, problem = [p for p in _library.problems_of(library, work) if p[-1] == POOL_BEFORE]
        assert _library.tiles_of(library, problem) == [POOLED, (3, 0, 0, 0)]
        found = work()
        _library.choose_tile(library, problem, (3, 0, 0, 0))
        parts = work()
        _library.choose_tile(library, problem, None)
        assert torch.equal(found, pooled_and_projected(x, weight, bias).to(dtype))
        assert torch.equal(found, parts)


@pytest.mark.parametrize("way", [BESIDE, (3, 0, 0, 0)])
def test_in_a_graph_an_inception_blocks_branches_run_beside_each_other_where_the_table_says_so(
    way: _library.Tile,
) -> None:
    library, work = simt_backend.install(), simt_backend.inception_of_small_tiles()
    in_line = work()
    (problem,) = [p for p in _library.problems_of(library, work) if p[-1] == BLOCK]
    assert _library.tiles_of(library, problem) == [BESIDE, (3, 0, 0, 0)]
    library.simt_forks()  # of others
    _library.choose_tile(library, problem, way)
    try:
        for _ in range(2):  # the second finds the first's streams
            assert torch.equal(simt_backend.captured(library, work), in_line)
            assert library.simt_forks() == (2 if way == BESIDE else 0)
        assert torch.equal(work(), in_line) and library.simt_forks() == 0  # launched, not captured
        assert library.simt_streams() <= 3
    finally:
        _library.choose_tile(library, problem, None)


@pytest.mark.parametrize("races", [False, True])
def test_the_ways_to_run_a_block_are_timed_as_graphs_and_compared(monkeypatch: pytest.MonkeyPatch, races: bool) -> None:
    library, work = simt_backend.install(), simt_backend.inception_of_small_tiles()
    graphs: list[Callable[[], torch.Tensor]] = []

    def seconds(variants: dict[_library.Tile, Callable[[], object]], device: torch.device) -> dict[object, float]:
        assert [*variants] == [BESIDE, (3, 0, 0, 0)] and [*variants.values()] == graphs
        return {tile: float(tile == BESIDE) for tile in variants}

    def graphed(work: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
        library.simt_forks()
        out = simt_backend.captured(library, work)
        out += races and library.simt_forks() > 0
        graphs.append(lambda: out)
        return graphs[-1]

    monkeypatch.setattr(tuning, "_seconds", seconds)
    monkeypatch.setattr(tuning, "graphed", graphed)
    (problem,) = [p for p in _library.problems_of(library, work) if p[-1] == BLOCK]
    table = _tables.Table()
    try:
        if races:
            with pytest.raises(RuntimeError, match="give different results"):
                tuning.measure_block(work, torch.device("cpu"), library, table)
        else:
            tuning.measure_block(work, torch.device("cpu"), library, table)
        assert [*table.tiles] == ([] if races else [(_tables.GEMM, *problem[1:])])
        library.simt_forks()
        simt_backend.captured(library, work)
        assert library.simt_forks() == (2 if races else 0)  # by the stand-in's rule; the fastest
    finally:
        _library.choose_tile(library, problem, None)


def test_a_pool_and_its_projection_take_what_is_not_finite_every_layout_and_any_values() -> None:
    images, weight, bias = (torch.randn(s).half() / 4 for s in ((3, 88, 10, 11), (40, 88, 1, 1), (40,)))
    weight += weight.sign() / 64  # none is zero, whose product with an infinity is NaN
    layouts = {
        "channels_last": last,
        "contiguous": lambda x: x,
        "a slice": lambda x: last(torch.cat([x, x, x], 1))[:, 88:176],
        "a slice off 16 bytes": lambda x: last(torch.nn.functional.pad(x, (0, 0, 0, 0, 3, 5)))[:, 3:91],
        "memory off 16 bytes": lambda x: (
            torch.cat([x.new_zeros(1), last(x).permute(0, 2, 3, 1).flatten()])[1:]
            .view(3, 10, 11, 88)
            .permute(0, 3, 1, 2)
        ),
    }
    shifted = torch.cat([bias.new_zeros(1), bias])[1:], torch.cat([weight.new_zeros(1), weight.flatten()])[1:]
    for name, layout in layouts.items():
        for special in (None, float("nan"), float("-inf"), float("inf")):
            x = images.clone()
            if special is not None:
                x[0, 5, 0, 0] = x[1, 80, 4:9, 2:8] = x[2, :, 9, 10] = special
                x[1, 40] = -3
            expected = pooled_and_projected(x, weight, bias)
            for w, b in ((weight, bias), (shifted[1].view_as(weight), shifted[0])):
                found = last_branch(layout(x), w, b)().double()
                torch.testing.assert_close(
                    found, expected, rtol=1e-3, atol=2e-3, equal_nan=True, msg=f"{name}, {special}"
                )


def test_parallel_weights_that_lie_below_each_other_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    library = simt_backend.install()
    step = library.fused_cnn_slice_step(9)
    op = sys.modules["fused_cnn.ops.inception.op"]
    monkeypatch.setattr(op, "runs_on_gpu_kernels", lambda *args: True)
    monkeypatch.setattr(op, "runs_packed", lambda *args: False)
    monkeypatch.setattr(op, "slice_step", lambda device: step)
    x = last(torch.randn(1, 8, 5, 5, dtype=torch.float16))
    for dtype in (torch.float16, torch.float32):
        shapes = weight_shapes(8, (136, 16, 8, 72, 8, 8), (3, 3))
        weights, biases = [torch.randn(s).to(dtype) / 4 for s in shapes], [torch.randn(s[0]).to(dtype) for s in shapes]
        packed = pack_inception(weights, biases, like=x.to(dtype))

        def cats(*parameters: Any, dtype: torch.dtype = dtype) -> tuple[torch.Tensor, int]:
            with profile(activities=[ProfilerActivity.CPU]) as found:
                out = inception(x.to(dtype), *parameters, backend="simt")
            return out, sum(event.name == "aten::cat" for event in found.events())

        (expected, copies), (out, none) = cats(weights, biases), cats(*packed)
        assert (copies, none) == (2, 0)  # of the weights and of the biases
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        # What only looks as if it lay so is copied.
        (first, *others), _ = packed
        assert cats([first.clone(), *others], packed[1])[1] == 1


def test_a_tile_that_is_wrong_is_found_before_its_first_use_and_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    library = simt_backend.install()
    used = ctypes.c_int.in_dll(library, "simt_gemm_tile")
    wrong, right = (0, 128, 128, 64), (0, 64, 64, 64)
    whole = functools.partial(_first_use._whole, torch.Generator().manual_seed(0))
    monkeypatch.setattr(_first_use, "DTYPES", (torch.float16,))
    monkeypatch.setattr(
        _first_use, "cases", lambda: [_first_use._convolution(whole, (2, 16, 9, 8), 24, 1, 1, 0, residual=True)]
    )

    def kernel(op: str) -> Callable[..., torch.Tensor]:
        def call(*args: Any) -> torch.Tensor:
            used.value = -1
            out: torch.Tensor = _library.kernel(op, "simt")(*args)
            if fails and used.value == 0:
                raise RuntimeError(fails)
            return out + (used.value == 0)  # the first of the stand-in's tiles

        return call

    half = 2  # DType::f16
    key, other = (_first_use.TILE, half, *wrong), (_first_use.TILE, half, *right)
    place, values = torch.device("cpu"), library.fused_cnn_problem_values()
    for fails, said in (("", _first_use.WRONG), ("launch failed", "launch failed"), ("CUDA out of memory", None)):
        found = _first_use.compare(library, kernel, place)
        assert found.get(key) == said
        if fails:  # nothing is known of what comes behind
            assert _first_use.ALL not in found and other not in found
            continue
        assert found[other] == found[_first_use.ALL] == _first_use.RIGHT
        assert key not in _first_use.compare(library, kernel, place, {key: said})
        problem = (-1, half, 1 << 20, 256, 64, 0, 1, 1, 1, 1, 0, 0)  # for which it would be chosen
        assert _library.tiles_of(library, problem)[0] == wrong
        try:
            _library.refuse_tile(library, problem, wrong)
            assert _library.tiles_of(library, problem) == [right, SPLIT, (3, 0, 0, 0)]
            with pytest.raises(ValueError, match="no tile"):
                _library.choose_tile(library, problem, wrong)
            assert _library.tiles_of(library, (-1, 3, *problem[2:]))[0] == wrong  # in bfloat16 it may
        finally:
            _library.refuse_tile(library, (-1, half, *[0] * (values - 2)), wrong, refused=False)
        assert _library.tiles_of(library, problem)[0] == wrong


@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
def test_fake_kernels_of_what_a_gpu_alone_has_are_as_the_results(format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 21, 18).half().contiguous(memory_format=format)
    weight, pool = torch.randn(8, 3, 7, 7).half(), ([3, 3], [2, 2], [1, 1], [1, 1], True)
    y, index = _library.kernel("max_pool2d_index_fwd", "simt")(x, *pool)
    calls: dict[str, tuple[Any, ...]] = {
        "stem_fwd": (x, weight, None, [2, 2], [3, 3], 0, True),
        "max_pool2d_index_fwd": (x, *pool),
        "max_pool2d_index_bwd": (y, index, [21, 18], *pool),
    }
    for name, arguments in calls.items():
        found = _library.kernel(name, "simt")(*arguments)
        with FakeTensorMode() as mode:
            fake = _library.kernel(name, "native")(*mapped(mode.from_tensor, arguments, torch.Tensor))
        for real, like in zip(tensors(found), tensors(fake), strict=True):
            assert (real.shape, real.stride(), real.dtype) == (like.shape, like.stride(), like.dtype), name


def test_a_wrong_tile_is_alone_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    library = simt_backend.install()
    used = ctypes.c_int.in_dll(library, "simt_gemm_tile")
    whole = functools.partial(_first_use._whole, torch.Generator().manual_seed(0))
    monkeypatch.setattr(_first_use, "DTYPES", (torch.float16,))
    monkeypatch.setattr(_first_use, "cases", lambda: [_first_use._inception(whole, (1, 3, 3))])
    wrong = (0, 64, 64, 64)  # by rule for both of the block's products

    def kernel(op: str) -> Callable[..., torch.Tensor]:
        def call(*args: Any) -> torch.Tensor:
            used.value = -1
            out: torch.Tensor = _library.kernel(op, "simt")(*args)
            return out + (used.value == 1)  # one product at a time is not the library's

        return call

    found = _first_use.compare(library, kernel, torch.device("cpu"))
    assert {key[2:] for key, what in found.items() if what == _first_use.WRONG} == {wrong}


def test_an_op_without_tiles_is_compared_and_one_that_was_wrong_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    x = torch.ones(1, 8, 4, 4)
    window = ([2, 2], [2, 2], [0, 0], [1, 1], False)
    pool = _first_use.Case("max_pool2d_fwd", (x, *window), torch.ones(1, 8, 2, 2), has_tiles=False)
    monkeypatch.setattr(_first_use, "cases", lambda: [pool])
    monkeypatch.setattr(_first_use, "convolutions", list)

    def kernel(op: str) -> Callable[..., torch.Tensor]:
        return lambda *args: [ran.append(op), torch.max_pool2d(args[0], 2) + 1][1]  # type: ignore[func-returns-value, return-value]

    key, library = (_first_use.OP, "max_pool2d_fwd"), simt_backend.install()
    found = _first_use.compare(library, kernel, torch.device("cpu"))
    assert found == {key: _first_use.WRONG, _first_use.ALL: _first_use.RIGHT} and len(ran) == 1
    assert _first_use.compare(library, kernel, torch.device("cpu"), found) == {_first_use.ALL: _first_use.RIGHT}
    assert len(ran) == 1


def test_what_is_not_finite_reaches_one_pixel_further_behind_an_odd_stem() -> None:
    x = torch.zeros(1, 3, 16, 16, dtype=torch.float16)
    x[0, 0, 8, 8] = float("nan")
    weight = torch.randn(8, 3, 7, 7, dtype=torch.float16)
    found = conv_bias_relu(x, weight, stride=2, padding=3, backend="simt")[0, 0].isnan()
    expected = torch.conv2d(x.float(), weight.float(), stride=2, padding=3)[0, 0].isnan()
    rows, columns = (expected.any(axis).nonzero().flatten() for axis in (1, 0))
    expected[rows[0] - 1 : rows[-1] + 1, columns[0] - 1 : columns[-1] + 1] = True
    assert torch.equal(found, expected)


# name: x's shape, and each block's convolutions (out, kernel, stride, padding, dilation); what the first one's shortcut
# is: nothing, x, or a convolution (out, kernel, stride).
STAGES: dict[str, tuple[Any, ...]] = {
    "bottlenecks, projected": ((2, 16, 9, 7), 2 * [[(8, 1, 1, 0, 1), (8, 3, 1, 1, 1), (32, 1, 1, 0, 1)]], (32, 1, 1)),
    "basic, strided": ((2, 8, 9, 9), [[(16, 3, 2, 1, 1), (16, 3, 1, 1, 1)]], (16, 1, 2)),
    "plain, dilated": ((3, 8, 6, 6), [[(8, 3, 1, 2, 2)], [(8, 1, 1, 0, 1)]], None),
    "odd channels": ((1, 5, 4, 4), 3 * [[(7, 1, 1, 0, 1), (5, 3, 1, 1, 1)]], "x"),
    "empty batch": ((0, 8, 5, 5), [[(8, 3, 1, 1, 1)]], "x"),
    "one pixel": ((2, 8, 1, 1), 2 * [[(24, 1, 1, 0, 1), (8, 1, 1, 0, 1)]], "x"),
    "one channel": ((2, 1, 5, 5), [[(8, 3, 1, 1, 1), (1, 3, 1, 1, 1)]], "x"),
}


@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_its_convolutions_one_by_one(name: str, dtype: torch.dtype, format: torch.memory_format) -> None:
    simt_backend.install()
    shape, blocks, shortcut = STAGES[name]
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=format)
    data: list[torch.Tensor] = []
    geometry: list[int] = []

    def convolution(of: torch.Tensor, out: int, kernel: int, stride: int, padding: int = 0, dilation: int = 1) -> Any:
        """What runs it, on `of` at first."""
        weight = last(torch.randn(out, of.size(1), kernel, kernel, dtype=dtype) / (of.size(1) * kernel**2) ** 0.5)
        bias = torch.randn(out if out != 16 else 0, dtype=dtype)  # that there may be none
        data.extend([weight, bias])
        geometry.extend([of.size(1), out, kernel, kernel, stride, stride, padding, padding, dilation, dilation])
        window = ((stride, stride), (padding, padding), (dilation, dilation), 1)
        run = _library.kernel("conv_bias_relu_fwd", "simt")
        return lambda y, added, relu: run(y, weight, bias if bias.numel() else None, added, *window, relu)

    y = last(x)
    runs: list[Any] = []
    added = None
    for i, block in enumerate(blocks):
        read = y
        for conv in block:
            if conv is block[-1] and (i > 0 or shortcut == "x"):
                added = read
            if conv is block[-1] and i == 0 and isinstance(shortcut, tuple):
                at = len(data), len(geometry)
                added = convolution(read, *shortcut)(read, None, False)
                runs = [data[at[0] :], geometry[at[1] :]]
                del data[at[0] :], geometry[at[1] :]
            y = convolution(y, *conv)(y, added if conv is block[-1] else None, True)
    stage = _library.kernel("residual_stage_packed_fwd", "simt")
    lengths, projects = [len(block) for block in blocks], isinstance(shortcut, tuple)
    arguments = ([*data, *(runs[0] if runs else [])], [*geometry, *(runs[1] if runs else [])], lengths)
    before, out = x.clone(), stage(x, *arguments, shortcut is not None, projects)
    torch.testing.assert_close(out, y, rtol=0, atol=0)  # the same kernels in the same order
    assert out.is_contiguous(memory_format=format) and torch.equal(x, before)
    if x.numel():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            known = _library.kernel("residual_stage_packed_fwd", "native")
            fake = known(mode.from_tensor(x), *arguments, shortcut is not None, projects)
        assert fake.shape == out.shape and fake.stride() == out.stride()


def test_what_a_stage_is_given_is_looked_at_first() -> None:
    simt_backend.install()
    run = _library.kernel("residual_stage_packed_fwd", "simt")
    x, weight, bias = last(torch.randn(1, 8, 5, 5)), last(torch.randn(8, 8, 3, 3)), torch.randn(8)
    geometry = [8, 8, 3, 3, 1, 1, 1, 1, 1, 1]
    wrong: dict[str, Any] = {
        "a weight and a bias of each convolution are wanted, got 1": ([weight], geometry),
        r"packed weight 0 must have shape \(8, 8, 3, 3\), got \(8, 8, 1, 1\)": ([weight[:, :, :1, :1], bias], geometry),
        r"packed bias must have shape \(8\), got \(7\)": ([weight, bias[:7]], geometry),
        "packed weight must have the dtype of x": ([weight.half(), bias], geometry),
        "10 values of geometry per packed weight": ([weight, bias], geometry[1:]),
        "a convolution of 7 channels meets an input of 8": ([weight, bias], [7, *geometry[1:]]),
    }
    for message, (data, shapes) in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            run(x, data, shapes, [1], True, False)


def test_a_packed_block_is_the_block() -> None:
    simt_backend.install()
    x = last(torch.randn(1, 8, 5, 5, dtype=torch.float16))
    channels, kernels = (8, 16, 8, 8, 8, 8), (3, 5)
    shapes = weight_shapes(8, channels, kernels)
    weights, biases = [torch.randn(s).half() / 4 for s in shapes], [torch.randn(s[0]).half() for s in shapes]
    expected = inception(x, weights, biases, backend="simt")
    run = _library.kernel("inception_packed_fwd", "simt")
    torch.testing.assert_close(run(x, [*weights, *biases], channels, kernels), expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"weight 4 must have 8 outputs and a kernel of 3, got shape \(8, 8, 5, 5\)"):
        run(x, [*weights, *biases], channels, (3, 3))
    with pytest.raises(RuntimeError, match=r"six weights and six biases, .* are wanted, got 11"):
        run(x, [*weights, *biases[1:]], channels, kernels)


def test_slices_without_columns_are_left_out() -> None:
    x = last(torch.randn(1, 8, 5, 5, dtype=torch.float16))
    shapes = weight_shapes(8, (8, 16, 8, 8, 8, 8), (3, 3))
    weights, biases = [torch.randn(s).half() / 4 for s in shapes], [torch.randn(s[0]).half() for s in shapes]
    expected = inception(x, weights, biases, backend="simt")[:, 8:]
    found = inception(x, [weights[0][:0], *weights[1:]], [biases[0][:0], *biases[1:]], backend="simt")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_add_relu_says_where_it_went_wrong() -> None:
    with pytest.raises(RuntimeError, match="must have the shape of x"):
        _library.kernel("add_relu_fwd", "simt")(torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 4))
    assert add_relu(torch.empty(0, 3, 2, 2), torch.empty(0, 3, 2, 2), backend="simt").numel() == 0
