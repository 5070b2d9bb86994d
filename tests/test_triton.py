"""Networks on the Triton backend: whole on a GPU where there is one, else their first stages in Triton's
interpreter."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_cnn import _library, fuse_
from fused_cnn._backends import status
from fused_cnn._trees import leaves_of
from fused_cnn.ops import (
    BatchNormArgs,
    bn_relu,
    concat_bias_relu,
    conv1x1_bias_relu,
    conv_bias_relu,
    inception,
    max_pool2d,
)
from fused_cnn.ops._cases import Maker, OpCases
from fused_cnn.testing import all_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not status("triton", DEVICE).on, reason="Triton runs neither on a GPU nor in its interpreter here"
)

MODELS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "googlenet": lambda: torchvision.models.googlenet(num_classes=10, aux_logits=False, init_weights=False),
}


def shortened(model: nn.Module) -> nn.Module:
    """On a GPU the whole network; for the interpreter what comes before the last layers, whose blocks are the same with
    more channels."""
    if DEVICE == "cpu":
        for name in ("layer3", "layer4", *(f"inception4{i}" for i in "abcde"), "inception5a", "inception5b"):
            if hasattr(model, name):
                setattr(model, name, nn.Identity())
        model.fc = nn.LazyLinear(10)
        model.eval()(torch.zeros(1, 3, 33, 33))
    return model


def lively(model: nn.Module) -> nn.Module:
    """BatchNorms with statistics that are not trivial, and no dropout, whose masks two models would not share."""
    generator = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(torch.randn(m.num_features, generator=generator) * 0.1)
            m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
            nn.init.uniform_(m.weight, 0.5, 1.5, generator=generator)
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return model.to(DEVICE)


def pair_of(name: str, images: int) -> tuple[nn.Module, nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = lively(shortened(MODELS[name]()))
        x = torch.randn(images, 3, 33, 33, device=DEVICE).contiguous(memory_format=torch.channels_last)
    fused = copy.deepcopy(model)
    report = fuse_(fused, backend="triton")
    assert report.fused and not report.skipped
    return model, fused, x


@pytest.mark.parametrize("name", MODELS)
def test_a_network_agrees_with_eager_in_eval(name: str) -> None:
    model, fused, x = pair_of(name, images=1)
    with torch.no_grad():
        truth = copy.deepcopy(model).eval().double()(x.double())
        eager, mine = model.eval()(x), fused.eval()(x)
    # The contract: twice eager's own error, and a term for sums in another order through twenty layers.
    assert (mine - truth).abs().max() <= 2 * (eager - truth).abs().max() + 1e-5 * truth.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_agrees_with_eager(name: str) -> None:
    model, fused, x = pair_of(name, images=2)
    truth = copy.deepcopy(model).double()
    for m, inputs in ((truth, x.double()), (model, x), (fused, x)):
        m.train()(inputs).logsumexp(1).sum().backward()
    exact, eager = dict(truth.named_parameters()), dict(model.named_parameters())
    for key, parameter in fused.named_parameters():
        want = exact[key].grad
        # At this size a ReLU or a window's choice that turns over moves one sum visibly; eager's own gradient moves as
        # much.
        allowed = 3 * (eager[key].grad - want).abs().max() + 1e-3 * want.abs().max() + 1e-6
        assert (parameter.grad - want).abs().max() <= allowed, key
    for key, buffer in fused.named_buffers():
        want = truth.get_buffer(key).double()
        # A deep layer's statistics carry the rounding of all layers before it, eager's as well as ours: relative to the
        # largest of them.
        allowed = 3 * (model.get_buffer(key) - want).abs().max() + 1e-4 * want.abs().max()
        assert (buffer - want).abs().max() <= allowed, key


@pytest.mark.parametrize("channels", [1, 17, 65])
def test_convolutions_read_their_channels_and_nothing_else(channels: int) -> None:
    """NaN in the channels beside x's, and in one pixel: it reaches the outputs whose windows hold that pixel, and no
    others."""
    generator = torch.Generator().manual_seed(channels)
    for kernel, stride, padding in ((1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 0)):
        wide = torch.full((2, 7, 6, channels + 5), float("nan"))
        x = wide[..., 3 : 3 + channels].permute(0, 3, 1, 2)
        x.copy_(torch.randint(-3, 4, x.shape, generator=generator))
        x[0, :, 2, 4] = float("nan")
        weight = torch.randint(-1, 2, (20, channels, kernel, kernel), generator=generator).float()
        bias = torch.randint(-2, 3, (20,), generator=generator).float()
        expected = torch.relu(nn.functional.conv2d(x, weight, bias, stride, padding))
        wide = wide.to(DEVICE)  # the slice stays a slice
        x = wide[..., 3 : 3 + channels].permute(0, 3, 1, 2)
        out = conv_bias_relu(x, weight.to(DEVICE), bias.to(DEVICE), stride=stride, padding=padding, backend="triton")
        torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)
        if kernel == 1:
            out = conv1x1_bias_relu(x, weight.to(DEVICE), bias.to(DEVICE), stride=stride, backend="triton")
            torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_gradient_of_the_weight_is_summed_over_all_its_parts(stride: int) -> None:
    """Thousands of pixels: the product over them is cut into parts, which a second stage adds up. Small integers, so
    sums are exact."""
    side = 50 * stride
    x = torch.randint(-2, 3, (2, 5, side, side)).float().to(DEVICE)
    weight = torch.randint(-2, 3, (7, 5, 1, 1)).float().to(DEVICE).requires_grad_()
    bias = torch.zeros(7, device=DEVICE, requires_grad=True)
    grad_out = torch.randint(-2, 3, (2, 7, 50, 50)).float().to(DEVICE)
    found = torch.autograd.grad(
        conv1x1_bias_relu(x, weight, bias, stride=stride, backend="triton"), (weight, bias), grad_out
    )
    plain = torch.relu(nn.functional.conv2d(x, weight, bias, stride))
    for actual, expected in zip(found, torch.autograd.grad(plain, (weight, bias), grad_out), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_vectors_may_have_any_strides() -> None:
    x, weight, bias = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 1, 1), torch.randn(16)[::2]
    for vector in (bias, torch.randn(1).expand(8)):
        expected = torch.relu(nn.functional.conv2d(x, weight, vector))
        out = conv1x1_bias_relu(x.to(DEVICE), weight.to(DEVICE), vector.to(DEVICE), backend="triton")
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-2, atol=1e-2)


SENTINEL = 7.0


@pytest.mark.parametrize("channels", [1, 17, 65])
def test_a_slice_is_written_whole_and_its_neighbours_are_not(channels: int) -> None:
    """Each kernel that writes into a slice of a wider tensor, alone: in an op, the next branch would write over what
    overran."""
    from fused_cnn.ops._triton import TILE, tiles
    from fused_cnn.ops._triton_conv import Geometry, conv_forward, weight_rows
    from fused_cnn.ops.batch_norm.triton import apply_kernel
    from fused_cnn.ops.concat.triton import bias_relu_kernel

    x = torch.randn(2, channels, 5, 7, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight, kernel = (torch.randn(channels, channels, k, k, device=DEVICE) for k in (1, 3))
    vectors = [torch.rand(channels, device=DEVICE) + 0.5 for _ in range(4)]
    rows, grid = 70, tiles(70, channels)

    def convolution(w: Tensor, geometry: Geometry) -> Callable[[Tensor, int], None]:
        return lambda part, pitch: conv_forward(x, weight_rows(w), vectors[0], None, geometry, True, [part])

    def concatenation(part: Tensor, pitch: int) -> None:
        bias_relu_kernel[grid](x, vectors[0], part, rows, channels, channels, pitch, BIAS=True, RELU=True, **TILE)

    def normalisation(part: Tensor, pitch: int) -> None:
        apply_kernel[grid](
            x, x, part, x, *vectors, *vectors[2:], rows, channels, channels, 0, pitch,
            ADD=False, INPUTS=1, RELU=True, SAVE_BITS=False, **TILE,
        )  # fmt: skip

    writers = (
        convolution(weight, Geometry((1, 1))), convolution(kernel, Geometry((3, 3), padding=(1, 1))),
        convolution(weight, Geometry((3, 3), padding=(1, 1), pool=True)), concatenation, normalisation,
    )  # fmt: skip
    for write in writers:
        wide = torch.full((2, 5, 7, channels + 8), SENTINEL, device=DEVICE).permute(0, 3, 1, 2)
        wide[:, 3 : 3 + channels] = float("nan")
        write(wide[:, 3 : 3 + channels], channels + 8)
        before, part, after = wide.split([3, channels, 5], 1)
        assert (before == SENTINEL).all() and (after == SENTINEL).all() and part.isfinite().all()


class NoSynchronisation(TorchDispatchMode):
    """Fails where a launcher waits for the device: reads a value, asks for an unknown size, or copies to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        waits = {
            "aten::_local_scalar_dense",
            "aten::item",
            "aten::nonzero",
            "aten::is_nonzero",
            "aten::equal",
            "aten::unique",
        }
        assert func.name() not in waits, f"{func.name()} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "op_cases", [o for o in all_cases() if _library.has_kernel(o.decides, "triton", DEVICE)], ids=lambda o: o.name
)
def test_launchers_never_wait_for_the_device(op_cases: OpCases) -> None:
    """So a CUDA graph can capture them; a GPU's own capture would say the same."""
    some = [c for c in op_cases.cases if not c.real and c.shape[0] > 0 and c.options.get("training", True)]
    case = min(some, key=lambda c: math.prod(c.shape))
    args, kwargs = op_cases.make(case, Maker(torch.float32, device=DEVICE))
    with NoSynchronisation():
        out = op_cases.op(*args, **kwargs, backend="triton")
        leaves = leaves_of((args, kwargs))
        torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)


def _vectors(n: int) -> BatchNormArgs:
    return BatchNormArgs(*(torch.rand(n, device=DEVICE) + 0.5 for _ in range(4)))


def _six(c: int) -> tuple[list[Tensor], list[Tensor]]:
    kernels = (1, 1, 3, 1, 3, 1)
    return [torch.randn(8, c, k, k, device=DEVICE) for k in kernels], [torch.randn(8, device=DEVICE) for _ in kernels]


ROOMS: dict[str, Callable[[Tensor], Tensor]] = {
    "conv1x1_bias_relu": lambda x: conv1x1_bias_relu(
        x, torch.ones(8, 8, 1, 1, device=DEVICE).to(x.dtype), stride=2, backend="triton"
    ),
    "conv_bias_relu": lambda x: conv_bias_relu(
        x, torch.ones(8, 8, 3, 3, device=DEVICE).to(x.dtype), padding=1, backend="triton"
    ),
    "inception": lambda x: inception(x, *([t.to(x.dtype) for t in part] for part in _six(8)), backend="triton"),
    "concat_bias_relu": lambda x: concat_bias_relu([x, x], backend="triton"),
    "bn_relu": lambda x: bn_relu(x, _vectors(8), backend="triton"),
    "bn_relu training": lambda x: bn_relu(x, _vectors(8)._replace(training=True), backend="triton"),
    "max_pool2d": lambda x: max_pool2d(x, 3, 2, 1, backend="triton"),
}


@pytest.mark.parametrize("room", ROOMS)
def test_more_pixels_than_can_be_numbered_are_an_error_before_memory_is_touched(room: str) -> None:
    x = torch.zeros(1, device=DEVICE).expand(2**15, 8, 256, 256)  # 2^31 pixels in four bytes
    with pytest.raises(ValueError, match=r"at most 2147418112 pixels .* got shape \(32768, \d+, 256, 256\)"):
        ROOMS[room](x)


def far_apart(pixels: int = 1100, pitch: int = 2_000_003) -> Tensor:
    """Pixels so far apart that the last lie past 2^31 elements. Only the pages that hold a pixel ever get memory."""
    memory = torch.empty((pixels - 1) * pitch + 8, dtype=torch.float16)
    assert memory.numel() > 2**31
    return memory.as_strided((1, 8, 1, pixels), (pixels * pitch, 1, pixels * pitch, pitch)).copy_(
        torch.randn(1, 8, 1, pixels)
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the memory would be allocated")
@pytest.mark.parametrize("room", ROOMS)
def test_offsets_go_past_two_to_the_31(room: str) -> None:
    def run(x: Tensor, grad_out: Tensor | None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        x = x.detach().requires_grad_()
        out = ROOMS[room](x)
        if grad_out is None or grad_out.shape != out.shape:  # a stride or a concatenation: only x is far apart
            grad_out = torch.ones_like(out)
        return out, torch.autograd.grad(out, x, grad_out)[0]

    x, grad_out = far_apart(), far_apart()
    near = (t.clone(memory_format=torch.channels_last) for t in (x, grad_out))
    for far, expected in zip(run(x, grad_out), run(*near), strict=True):
        assert torch.equal(far, expected)


def test_float32_products_follow_pytorchs_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_cnn.ops._triton_conv import PRECISION, products

    conv: Any = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for setting, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            conv.fp32_precision = setting
            assert products(torch.float32) == PRECISION[products(torch.float32)] == expected
            assert PRECISION[products(torch.float16)] == "tf32"
    finally:
        conv.fp32_precision = before
