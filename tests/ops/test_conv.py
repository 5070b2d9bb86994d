"""Convolutions and the residual addition: packed weights, the window that is read, what is not finite."""

import itertools

import pytest
import torch
from conftest import DEVICE, backends
from op_checks import CONVOLUTIONS, check_packed, small

import fused_cnn
from fused_cnn.ops import conv_bias_relu, pack_conv
from fused_cnn.ops._cases import LAYOUTS, Case, OpCases

NAN, INF = float("nan"), float("inf")


@pytest.mark.skipif(DEVICE != "cpu", reason="weights are packed for the CPU")
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op_cases", "case"), [(o, small(c)) for o in CONVOLUTIONS for c in o.cases], ids=lambda v: v.name
)
def test_packed_weights_agree_with_float64(op_cases: OpCases, case: Case, dtype: torch.dtype, layout: str) -> None:
    check_packed(op_cases, case, dtype, layout)


@pytest.mark.parametrize("backend", backends())
def test_nan_and_infinity_go_through_as_in_pytorch(backend: str) -> None:
    values = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e-40, -1e-40, 3.0])
    x = values.view(1, 8, 1, 1).expand(1, 8, 8, 1).contiguous(memory_format=torch.channels_last)
    residual = values.view(1, 1, 8, 1).expand(1, 8, 8, 1).contiguous(memory_format=torch.channels_last)
    x, residual = x.to(DEVICE).requires_grad_(), residual.to(DEVICE)
    out, expected = fused_cnn.add_relu(x, residual, backend=backend), torch.relu(x + residual)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    grad, expected_grad = (torch.autograd.grad(o.nan_to_num().sum() + o.sum(), x)[0] for o in (out, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_and_written_as_it_is(level: str, dtype: torch.dtype) -> None:
    """Subnormals, of which an instruction would make zeros, infinities and NaN; and sums are rounded to even."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = numbers.view(1, 32, 32, 64).permute(0, 3, 1, 2)
    for residual in (torch.zeros_like(x), x.flip(3)):
        out = fused_cnn.add_relu(x, residual, backend="native")
        torch.testing.assert_close(out, torch.relu(x + residual), rtol=0, atol=0, equal_nan=True)


def test_nan_reaches_only_the_pixels_whose_window_holds_it() -> None:
    x = torch.randn(1, 5, 9, 9, device=DEVICE)
    x[0, 2, 4, 4] = NAN
    weight = torch.randn(7, 5, 3, 3, device=DEVICE)
    out = fused_cnn.conv_bias_relu(x, weight, padding=1)
    assert torch.equal(out.isnan(), torch.relu(torch.nn.functional.conv2d(x, weight, padding=1)).isnan())


# kernel, stride, padding, dilation
GEOMETRIES = [
    (1, 1, 0, 1), (1, 2, 0, 1), (1, 1, 1, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 0, 1), (3, 3, 2, 1), (3, 1, 2, 2), (7,
    2, 3, 1),
]  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="weights are packed for the CPU")
@pytest.mark.usefixtures("two_threads", "nan_filled_memory", "level")
@pytest.mark.parametrize("channels", [1, 3, 16, 17, 24, 32, 48, 112, 528])
def test_every_instruction_set_reads_the_window_and_nothing_else(channels: int) -> None:
    """Small integers, so that sums are exact in any order; NaN in the channels beside x's, and in one pixel of x."""
    for (kernel, stride, padding, dilation), width in itertools.product(GEOMETRIES, (7, 14, 15, 17, 28, 55)):
        dtype = torch.float32 if width == 28 else torch.bfloat16
        sliced, out_channels = (width + padding) % 2, (5, 16, 40, 64)[(channels + kernel + stride) % 4]
        wide = torch.full((2, 5, width, channels + 5 * sliced), NAN).to(dtype)
        x = wide[..., 2 * sliced :][..., :channels].permute(0, 3, 1, 2)
        x.copy_(torch.randint(-3, 4, x.shape))
        x[0, :, 2, width // 2] = x[1, -1, 0, 0] = NAN
        weight, bias = (
            torch.randint(-1, 2, (out_channels, channels, kernel, kernel)),
            torch.randint(-2, 3, (out_channels,)),
        )
        plain = torch.nn.functional.conv2d(x.float(), weight.float(), bias.float(), stride, padding, dilation)
        residual = torch.randint(-9, 10, plain.shape)
        packed, left = pack_conv(weight.to(dtype), bias.to(dtype), like=x, stride=stride, dilation=dilation)
        expected = torch.relu(plain + residual).to(dtype)
        for threads in (1, 2):  # one thread takes larger blocks
            torch.set_num_threads(threads)
            out = conv_bias_relu(x, packed, left, residual.to(dtype), stride=stride, padding=padding, dilation=dilation)
            same = torch.allclose(out.double(), expected.double(), rtol=0, atol=0, equal_nan=True)
            assert same, (kernel, stride, padding, dilation, width, sliced, dtype, threads)


@pytest.mark.skipif(DEVICE != "cuda", reason="cuDNN's fused call")
def test_what_lay_in_the_results_memory_does_not_matter() -> None:
    """cudnn_convolution_relu hands its own result, not yet written, to cuDNN as an addend, with a factor of zero."""
    shapes = ((32, 64, 28, 28), (64, 64, 3, 3))
    x, weight = (
        torch.randn(s, device=DEVICE, dtype=torch.float16).to(memory_format=torch.channels_last) for s in shapes
    )
    expected = conv_bias_relu(x, weight, padding=1, backend="native")
    seen = set()
    for _ in range(4):
        found = conv_bias_relu(x, weight, padding=1, backend="native")
        assert torch.equal(found, expected)
        seen.add(found.data_ptr())
        found.fill_(NAN)
        del found
    assert len(seen) < 4
