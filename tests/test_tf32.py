"""Float32 on tensor cores, in TF32, where PyTorch's switch for cuDNN's convolutions allows it: the kernels' stand-in
(simt_backend.py) rounds operands as TMA does."""

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import simt_backend
import torch
from conftest import DEVICE
from torch import Tensor

from fused_cnn import _first_use, _library, _tables, tuning
from fused_cnn.ops import conv1x1_bias_relu, conv_bias_relu, inception
from fused_cnn.ops.inception.op import weight_shapes

SWITCHES: Any = torch.backends
FLOAT32 = 1  # DType::f32
PRODUCT, CONVOLUTION, OF_LIBRARY = (0, 128, 128, 32), (1, 128, 64, 32), (3, 0, 0, 0)


@pytest.fixture(autouse=True)
def stand_in(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        return
    if DEVICE == "cuda":
        pytest.skip("the kernels themselves run here")
    request.getfixturevalue("checked_memory")


@pytest.fixture
def allowed() -> Iterator[None]:
    SWITCHES.cudnn.allow_tf32 = True
    yield
    SWITCHES.cudnn.allow_tf32 = False


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def whole(largest: int, *shape: int) -> Tensor:
    return torch.randint(-largest, largest + 1, shape).float()


def problems(work: Callable[[], object]) -> list[_library.Problem]:
    return _library.problems_of(simt_backend.install(), work)


def own_tiles(work: Callable[[], object]) -> set[_library.Tile]:
    """Those that may run a piece of work, but for the library's."""
    library = simt_backend.install()
    parts = [problem for problem in problems(work) if problem[-1] != _library.BLOCK]
    return {tile for problem in parts for tile in _library.tiles_of(library, problem)} - {OF_LIBRARY}


def rounded(t: Tensor) -> Tensor:
    """To TF32's eleven bits, ties to even."""
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("side", [1, 3])
def test_pytorchs_switch_decides_at_each_call(side: int) -> None:
    x, weight = last(torch.randn(2, 16, 5, 6)), torch.randn(24, 16, side, side) / (4 * side)

    def work() -> Tensor:
        return conv_bias_relu(x, weight, padding=side // 2, relu=False, backend="simt")

    exact = torch.conv2d(x, weight, padding=side // 2)
    of_rounded = torch.conv2d(rounded(x).double(), rounded(weight).double(), padding=side // 2)

    def check(takes_tf32: bool) -> None:
        assert len(problems(work)) == takes_tf32
        found = work()
        if takes_tf32:
            torch.testing.assert_close(found.double(), of_rounded, rtol=1e-5, atol=1e-6)
            assert (found - exact).abs().max() > 1e-5
        else:
            assert torch.equal(found, exact)

    check(False)
    for switch, name, on, off in (
        (SWITCHES.cudnn, "allow_tf32", True, False),
        (SWITCHES.cudnn, "fp32_precision", "tf32", "none"),
        (SWITCHES, "fp32_precision", "tf32", "none"),
        (SWITCHES.cudnn.conv, "fp32_precision", "tf32", "ieee"),
    ):
        try:
            setattr(switch, name, on)
            check(True)
            SWITCHES.cudnn.enabled = False  # whose switch it is
            check(False)
        finally:
            SWITCHES.cudnn.enabled = True
            setattr(switch, name, off)
        check(False)
    SWITCHES.cudnn.allow_tf32 = False


def test_a_rounded_operand_is_off_by_a_2048th(allowed: None) -> None:
    x, weight = last(torch.randn(1, 256, 4, 4)), torch.randn(16, 256, 1, 1)
    found = conv1x1_bias_relu(x, weight, relu=False, backend="simt").double()
    exact = torch.conv2d(x.double(), weight.double())
    bound = torch.conv2d(x.double().abs(), weight.double().abs()) * 2**-10  # of two operands
    assert ((found - exact).abs() <= bound * 1.01).all() and not torch.equal(found.float(), exact.float())


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(1, 1, 0, 1), (1, 2, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 2)]
)
@pytest.mark.parametrize("channels", [4, 12, 24])
def test_every_geometry_and_address(
    allowed: None, channels: int, kernel: int, stride: int, padding: int, dilation: int
) -> None:
    how: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    images, weight, bias = whole(3, 2, channels, 9, 8), whole(2, 20, channels, kernel, kernel), whole(9, 20)
    y = torch.conv2d(images, weight, bias, **how)
    residual = whole(9, *y.shape)
    tight, wide = last(images), last(torch.cat([whole(1, 2, 1, 9, 8), images, whole(1, 2, 2, 9, 8)], 1))
    shifted = torch.cat([bias[:1], bias])[1:]  # off 16 bytes
    for x in (images, tight, wide[:, 1 : 1 + channels]):
        for added in (None, residual, last(residual)):
            work = functools.partial(conv_bias_relu, x, weight, shifted, added, **how, backend="simt")
            assert torch.equal(work(), torch.relu(y if added is None else y + added))
    # A strided 1x1 window's may be either: over a copy of its pixels it is a product.
    own = ({PRODUCT} if kernel == 1 else set()) | ({CONVOLUTION} if kernel * stride > 1 else set())
    assert own_tiles(functools.partial(conv_bias_relu, tight, weight, **how, backend="simt")) == own


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 20), (16, 24), (6, 8), (8, 6)])
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_lies_on_16_bytes_depends_on_the_type(
    allowed: None, inputs: int, outputs: int, side: int, dtype: torch.dtype
) -> None:
    x, weight = last(whole(2, 1, inputs, 5, 4)).to(dtype), whole(2, outputs, inputs, side, side).to(dtype)

    def work() -> Tensor:
        return conv_bias_relu(x, weight, padding=side // 2, backend="simt")

    takes = all(channels * dtype.itemsize % 16 == 0 for channels in (inputs, outputs))
    assert {k for *_, k in own_tiles(work)} == ({32 if dtype == torch.float32 else 64} if takes else set())
    assert torch.equal(work(), torch.relu(torch.conv2d(x.float(), weight.float(), padding=side // 2)).to(dtype))


def test_slices_of_whole_16_bytes(allowed: None) -> None:
    x = last(whole(1, 1, 12, 5, 5))
    shapes = weight_shapes(12, (132, 20, 12, 140, 4, 36), (3, 5))
    weights, biases = [whole(1, *shape) for shape in shapes], [whole(3, shape[0]) for shape in shapes]

    def work() -> Tensor:
        out: Tensor = inception(x, weights, biases, backend="simt")
        return out

    assert own_tiles(work) == {PRODUCT, CONVOLUTION}
    assert 3 in {problem[6] for problem in problems(work)}
    result = work()
    SWITCHES.cudnn.allow_tf32 = False
    assert not problems(work) and torch.equal(work(), result)
    expected = torch.relu(torch.conv2d(x, weights[0], biases[0]))
    assert torch.equal(result[:, :132], expected)


def test_kernels_of_16_bit_types_alone_do_not_take_it(allowed: None) -> None:
    stem, weight = torch.randn(1, 3, 16, 16), torch.randn(8, 3, 7, 7)
    pooled = _library.kernel("stem_fwd", "simt")
    for dtype, takes in ((torch.float16, True), (torch.float32, False), (torch.float64, False)):
        x, w = stem.to(dtype), weight.to(dtype)
        alone = functools.partial(conv_bias_relu, x, w, stride=2, padding=3, backend="simt")
        before_a_pool = functools.partial(pooled, x, w, None, [2, 2], [3, 3], 1, False)
        assert bool(own_tiles(alone)) == bool(own_tiles(before_a_pool)) == takes


def test_what_a_table_chose_does_not_outlive_the_switch(allowed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    library = simt_backend.install()
    used = ctypes.c_int.in_dll(library, "simt_gemm_tile")
    x, weight = last(torch.randn(1, 16, 4, 4)), torch.randn(24, 16, 1, 1)

    def work() -> Tensor:
        used.value = -1
        return conv1x1_bias_relu(x, weight, backend="simt")

    (problem,) = problems(work)
    assert problem[1:] == (FLOAT32, 16, 24, 16, 0, 1, 1, 1, 1, 1, 0)
    monkeypatch.setattr(tuning, "_seconds", lambda variants, device: {t: t == OF_LIBRARY for t in variants})
    table = _tables.Table()
    tuning.measure_tiles(work, x.device, library, table)
    assert table.tiles[(_tables.GEMM, *problem[1:])]["best"] == list(PRODUCT)
    try:
        in_tf32 = work()
        assert used.value >= 0
        SWITCHES.cudnn.allow_tf32 = False
        exact = torch.relu(torch.conv2d(x, weight))
        assert torch.equal(work(), exact) and used.value < 0 and not torch.equal(in_tf32, exact)
        tuning.measure_tiles(work, x.device, library, table)
        assert len(table.tiles) == 1  # of nothing: it is no problem of tensor cores
    finally:
        _library.choose_tile(library, problem, None)


def test_gradients_are_the_librarys(allowed: None) -> None:
    x, weight = last(torch.randn(2, 8, 5, 5)).requires_grad_(), torch.randn(8, 8, 3, 3, requires_grad=True)
    out = conv_bias_relu(x, weight, padding=1, relu=False, backend="simt")
    found = torch.autograd.grad(out.sum(), (x, weight))
    expected = torch.autograd.grad(torch.conv2d(x, weight, padding=1).sum(), (x, weight))
    assert all(map(torch.equal, found, expected))


def test_it_is_compared_before_its_first_use_whatever_the_switch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    library, device = simt_backend.install(), torch.device("cpu")
    small = functools.partial(_first_use._whole, torch.Generator().manual_seed(0))
    monkeypatch.setattr(_first_use, "cases", list)
    monkeypatch.setattr(
        _first_use,
        "convolutions",
        lambda: [
            _first_use._convolution(small, (2, 24, 5, 4), 20, 1, 1, 0, residual=True),
            _first_use._convolution(small, (1, 24, 5, 4), 20, 3, 2, 1, residual=False),
        ],
    )
    x, weight = torch.randn(1, 8, 3, 3), torch.randn(8, 8, 1, 1)
    exact = torch.conv2d(x, weight)

    def kernel(op: str) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            found: list[Tensor] = []

            def elsewhere() -> None:
                found.append(conv1x1_bias_relu(x, weight, relu=False, backend="simt"))

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            assert torch.equal(found[0], exact)  # another thread's float32 is exact meanwhile
            out: Tensor = _library.kernel(op, "simt")(*args)
            return out + (what == _first_use.WRONG)

        return call

    keys = [(_first_use.TILE, FLOAT32, *tile) for tile in (PRODUCT, CONVOLUTION)]
    for what in (_first_use.RIGHT, _first_use.WRONG):
        expected = {**dict.fromkeys(keys, what), _first_use.ALL: _first_use.RIGHT}
        assert _first_use.compare(library, kernel, device) == expected
        assert torch.equal(conv1x1_bias_relu(x, weight, relu=False, backend="simt"), exact)


@pytest.mark.gpu
@pytest.mark.parametrize(("side", "tile"), [(1, PRODUCT), (3, CONVOLUTION)])
def test_a_gpu_rounds_operands_and_does_not_cut_them_off(allowed: None, side: int, tile: _library.Tile) -> None:
    library = _library.cuda.loaded
    if library is None or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("these tiles are sm_90a's")
    x, weight = (1 + torch.rand(shape, device=DEVICE) for shape in ((8, 64, 14, 15), (72, 64, side, side)))

    def work() -> Tensor:
        return conv_bias_relu(last(x), weight, padding=side // 2, relu=False, backend="native")

    (problem,) = _library.problems_of(library, work)
    _library.choose_tile(library, problem, tile)
    try:
        found = work().double()
    finally:
        _library.choose_tile(library, problem, None)
    error = found / torch.conv2d(x.double(), weight.double(), padding=side // 2) - 1
    # Cut off, both operands would be too small, by about 2^-11 each; rounded, the errors cancel out.
    assert 2**-20 < error.abs().max() <= 2**-10 and error.mean().abs() < 2**-13
