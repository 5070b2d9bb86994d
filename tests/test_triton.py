"""Whole networks on the Triton backend: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fused_cnn import fuse_
from fused_cnn._backends import status
from fused_cnn.ops import conv1x1_bias_relu, conv_bias_relu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not status("triton", DEVICE).on, reason="Triton runs neither on a GPU nor in its interpreter here")

MODELS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "googlenet": lambda: torchvision.models.googlenet(num_classes=10, aux_logits=False, init_weights=False),
}


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


def pair_of(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = lively(MODELS[name]())
        x = torch.randn(2, 3, 33, 33, device=DEVICE).contiguous(memory_format=torch.channels_last)
    fused = copy.deepcopy(model)
    report = fuse_(fused, backend="triton")
    assert report.fused and not report.skipped
    return model, fused, x


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_network_agrees_with_eager_in_eval(name: str) -> None:
    model, fused, x = pair_of(name)
    with torch.no_grad():
        truth = copy.deepcopy(model).eval().double()(x.double())
        eager, mine = model.eval()(x), fused.eval()(x)
    # The contract: twice eager's own error, and a term for sums in another order through twenty layers.
    assert (mine - truth).abs().max() <= 2 * (eager - truth).abs().max() + 1e-5 * truth.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_agrees_with_eager(name: str) -> None:
    model, fused, x = pair_of(name)
    truth = copy.deepcopy(model).double()
    for m, inputs in ((truth, x.double()), (model, x), (fused, x)):
        m.train()(inputs).logsumexp(1).sum().backward()
    exact, eager = dict(truth.named_parameters()), dict(model.named_parameters())
    for key, parameter in fused.named_parameters():
        want = exact[key].grad
        # At this size a ReLU or a window's choice that turns over moves one sum visibly; eager's own gradient moves as much.
        allowed = 3 * (eager[key].grad - want).abs().max() + 1e-3 * want.abs().max() + 1e-6
        assert (parameter.grad - want).abs().max() <= allowed, key
    for key, buffer in fused.named_buffers():
        torch.testing.assert_close(buffer.double(), truth.get_buffer(key).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 17, 65])
def test_convolutions_read_their_channels_and_nothing_else(channels: int) -> None:
    """NaN in the channels beside x's, and in one pixel: it reaches the outputs whose windows hold that pixel, and no others."""
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


def test_vectors_may_have_any_strides() -> None:
    x, weight, bias = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 1, 1), torch.randn(16)[::2]
    for vector in (bias, torch.randn(1).expand(8)):
        expected = torch.relu(nn.functional.conv2d(x, weight, vector))
        out = conv1x1_bias_relu(x.to(DEVICE), weight.to(DEVICE), vector.to(DEVICE), backend="triton")
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-2, atol=1e-2)
