"""The CPU convolution's Winograd form: 3 x 3, stride 1 (csrc/cpu/engine/conv_winograd.inc)."""

import pytest
import torch
from conftest import DEVICE
from torch import Tensor
from torch.nn.functional import conv2d

from fused_cnn import _library
from fused_cnn.ops import FoldedConv, conv_bias_relu, pack_conv, pack_residual_block, residual_stage
from fused_cnn.testing import judge

NAN, INF = float("nan"), float("inf")
pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="a form of the CPU convolution"),
    pytest.mark.usefixtures("two_threads", "nan_filled_memory"),
]


def weights_read(x: Tensor, weight: Tensor, padding: int = 1, in_place: bool = False) -> int:
    geometry = (weight.shape[2:], (1, 1), (padding,) * 2, (1, 1))
    bfloat16 = x.dtype == torch.bfloat16
    return _library.conv_work(x.shape, weight.size(0), *geometry, bfloat16=bfloat16, in_place=in_place)[0]


def transforms(x: Tensor, weight: Tensor, padding: int = 1, in_place: bool = False) -> bool:
    """Whether such a call runs in Winograd's form: it then reads 24 floats for nine weights."""
    return weights_read(x, weight, padding, in_place) >= 24 * 4 * weight.size(0) * weight.size(1)


def inputs(shape: tuple[int, ...], out_channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(shape).relu().to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, shape[1], 3, 3) / (9 * shape[1]) ** 0.5
    return x, weight.to(dtype), torch.randn(out_channels).to(dtype)


# N, C, H, W, out, padding: whole tiles and all ways to overhang one, channels that fill no vector, images of one tile's
# size and less, blocks that end within an image, panels of one vector
SHAPES = [
    (1, 64, 28, 28, 64, 1), (3, 16, 14, 14, 33, 1), (2, 17, 13, 15, 40, 0), (1, 40, 11, 18, 5, 2), (9, 24, 2, 4, 48, 1),
    (30, 19, 1, 3, 16, 1), (2, 256, 9, 6, 130, 1), (5, 512, 7, 7, 96, 1), (2, 20, 23, 29, 17, 3),
]  # fmt: skip


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_float64_whatever_the_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *size, out_channels, padding = shape
    x, weight, bias = inputs(tuple(size), out_channels, dtype)
    truth = conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    residual = torch.randn_like(truth).to(dtype).to(memory_format=torch.channels_last)
    packed, _ = pack_conv(weight, bias, like=x)
    wide = torch.full((size[0], size[1] + 5, *size[2:]), NAN, dtype=dtype).to(memory_format=torch.channels_last)
    sliced = wide[:, 3 : 3 + size[1]].copy_(x)
    found = []
    for threads, image, addend, relu in (
        (1, x, None, False),
        (2, x, None, False),
        (2, sliced, residual, True),
        (2, x, residual, True),
    ):
        torch.set_num_threads(threads)
        out = conv_bias_relu(image, packed, None, addend, padding=padding, relu=relu)
        eager = conv2d(x, weight, bias, padding=padding) + (0 if addend is None else addend)
        exact = truth + (0 if addend is None else addend.double())
        if relu:
            eager, exact = eager.relu(), exact.relu()
        # Eager adds a bfloat16 residual to a rounded sum; 8 float32 units cover sums of few channels, where eager's
        # error is a unit or two.
        comparison = judge("out", out, eager, exact, factor=2, rounding=1, summation=8, dtype=dtype)
        assert comparison.ok, (threads, comparison)
        found.append(out)
    assert torch.equal(found[0], found[1])  # threads share the work, and change no sum
    assert torch.equal(found[2], found[3])


def test_what_takes_this_form_and_what_does_not() -> None:
    for dtype, size, expected in (
        (torch.float32, (1, 64, 56, 56), True),
        (torch.float32, (8, 512, 7, 7), True),
        (torch.float32, (1, 512, 2, 4), False),  # reading the weights would take longer than the sums
        (torch.float32, (1, 3, 56, 56), False),  # so would the transforms
    ):
        x, weight, bias = inputs(size, 64, dtype)
        packed, _ = pack_conv(weight, bias, like=x)
        assert transforms(x, weight) is expected, size
        assert weights_read(x, weight) <= packed.data.numel()
    assert not transforms(*inputs((1, 64, 56, 56), 64, torch.float32)[:2], in_place=True)  # type: ignore[misc]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (6, 20, 3, 3), (33, 3, 7, 7), (5, 70, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_a_packed_weight_is_left_as_it_was_in_memory(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # Whether weights are stale is told by comparing what is packed byte by byte.
    weight = torch.zeros(shape, dtype=dtype)
    packed, _ = pack_conv(weight, None, like=weight)
    assert not (packed.data & 0x7F).any()  # all zeros but for their signs


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38])
def test_what_is_not_finite_reaches_its_neighbours_only(value: float) -> None:
    x, weight, bias = inputs((2, 32, 20, 20), 40, torch.float32)
    x[1, 5, 9, 6] = value
    assert transforms(x, weight)
    residual = torch.randn(2, 40, 20, 20)
    out = conv_bias_relu(x, *pack_conv(weight, bias, like=x), residual, padding=1)
    expected = (conv2d(x, weight, bias, padding=1) + residual).relu()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("value", [1e4, 1e8, 1e20])
def test_a_large_pixel_costs_its_tile_digits_in_proportion_and_no_other(value: float) -> None:
    x, weight, bias = inputs((1, 32, 16, 16), 40, torch.float32)
    x[0, 5, 8, 8] = value
    truth = conv2d(x.double(), weight.double(), bias.double(), padding=1)
    error = (conv_bias_relu(x, *pack_conv(weight, bias, like=x), padding=1, relu=False) - truth).abs()
    assert error.max() <= 32 * torch.finfo(torch.float32).eps * value
    error[..., 4:12, 2:14] = 0  # every tile that reads the pixel lies in here
    assert error.max() <= 1e-5


def test_images_give_the_same_whatever_the_threads_and_their_place_in_the_batch() -> None:
    """A block takes as many images at a time as its threads' caches hold, and the last time fewer."""
    x, weight, bias = inputs((42, 512, 7, 7), 512, torch.float32)
    x[41] = x[0]
    block = pack_residual_block([FoldedConv(weight, bias, padding=1)] * 2, None, shortcut=True, like=x)
    assert block is not None
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(residual_stage(x, block))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][0], found[0][41])


def test_a_residual_that_is_added_in_place_is_added_once() -> None:
    """A block's projection is written where its result goes. Computing again, as for what is not finite, would add the
    sum to itself."""
    x, weight, bias = inputs((2, 32, 12, 12), 32, torch.float32)
    project = torch.randn(32, 32, 1, 1) / 6
    units = [FoldedConv(weight, bias, padding=1), FoldedConv(weight, bias, padding=1)]
    x[0, 0, 0, 0] = NAN
    block = pack_residual_block(units, FoldedConv(project, None), shortcut=True, like=x)
    assert block is not None
    hidden = conv2d(x, weight, bias, padding=1).relu()
    expected = (conv2d(hidden, weight, bias, padding=1) + conv2d(x, project)).relu()
    torch.testing.assert_close(residual_stage(x, block), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
