"""stem: its gradients, its errors, and the networks that begin with it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor, nn

import fused_cnn
from fused_cnn.models import build, resnet18
from fused_cnn.nn import stem as stem_module
from fused_cnn.nn.stem import StemmedNetwork


def parts(x: Tensor, w: Tensor, b: Tensor | None, pool_padding: int = 1, ceil_mode: bool = False) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x, w, b, 2, 3)), 3, 2, pool_padding, ceil_mode=ceil_mode)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("how", [(1, False), (0, True)])
def test_gradients_are_those_of_the_parts(backend: str | None, how: tuple[int, bool]) -> None:
    # In float64, so that rounding moves no maximum from one pixel to another.
    made = [torch.randn(s, dtype=torch.float64, device=DEVICE) for s in ((2, 3, 21, 18), (8, 3, 7, 7), (8,))]
    ours, theirs = ([t.clone().requires_grad_() for t in made] for _ in range(2))
    out = fused_cnn.stem(*ours, pool_padding=how[0], ceil_mode=how[1], backend=backend)
    expected = parts(*theirs, *how)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    pairs = zip(torch.autograd.grad(out, ours, grad), torch.autograd.grad(expected, theirs, grad), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted)


X, W = torch.randn(1, 3, 12, 12, device=DEVICE), torch.randn(8, 3, 7, 7, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fused_cnn.stem(X, W, pool_padding=2), "pool_padding must be 0 or 1, got 2"),
        (lambda: fused_cnn.stem(X, W[:, :2]), "x has 3 channels; a weight of shape"),
        (lambda: fused_cnn.stem(X, W, W[0, 0, 0]), "bias"),
        (lambda: fused_cnn.stem(X[:, :, :1, :1], W, padding=0), "kernel \\(7, 7\\) is larger"),
        (lambda: fused_cnn.stem(X[:, :, :8, :8], W, padding=0, pool_padding=0), "no window \\(3, 3\\) of the pool"),
        (lambda: fused_cnn.stem(X[0], W), "x must have 4 dimensions"),
    ],
)
def test_bad_input_is_an_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Networks take the path of a GPU, on which `stem` is its parts where there is none; what is asked for is told."""
    asked: list[str] = []

    def stem(*args: Any, **kwargs: Any) -> Tensor:
        asked.append("stem")
        return fused_cnn.stem(*args, **kwargs)

    monkeypatch.setattr("fused_cnn.nn.fold.stem", stem)
    if DEVICE == "cpu":
        monkeypatch.setattr(stem_module, "runs_on_gpu_kernels", lambda *args: True)
        monkeypatch.setattr("fused_cnn.nn.fold.pack_conv", lambda weight, bias, like, **how: (weight, bias))
    return asked


def torchvisions() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18()


def timms() -> nn.Module:
    return pytest.importorskip("timm").create_model("resnet18")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": torchvisions,
    "timm": timms,
    "own": lambda: resnet18(backend="reference"),
    "torchvision googlenet": lambda: pytest.importorskip("torchvision").models.googlenet(init_weights=True),
    "own googlenet": lambda: build("googlenet", backend="reference"),
    "the paper's googlenet": lambda: build("googlenet_paper", backend="reference"),
}


@torch.no_grad()
@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
def test_networks_run_their_stem_and_pool_as_one_op(
    made: Callable[[], nn.Module], format: torch.memory_format, as_on_a_gpu: list[str], request: pytest.FixtureRequest
) -> None:
    model = made().to(DEVICE).eval()
    side = 224 if "paper" in request.node.callspec.id else 96  # its last pool is 7 x 7
    x = torch.randn(2, 3, side, side, device=DEVICE).contiguous(memory_format=format)
    expected = model(x)
    fused_cnn.fuse_(model)
    assert isinstance(model, StemmedNetwork)
    pool: Any = getattr(model, model.fused_stem_pool)
    bound = {"rtol": 1e-3, "atol": 1e-3 * expected.abs().max().item()}  # other sums, 18 layers deep
    torch.testing.assert_close(model(x), expected, **bound)
    assert as_on_a_gpu == ["stem"]

    seen: list[Tensor] = []
    hook = pool.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(model(x), expected, **bound)
    assert len(seen) == 1 and as_on_a_gpu == ["stem"]  # the pool is called, with whoever watches it
    hook.remove()
    model(x)
    assert as_on_a_gpu == ["stem"] * 2

    # Whatever becomes of the pool is seen: also what is changed and changed back with calls of other kinds between, and
    # what a list holds.
    eager = copy.deepcopy(model)
    fused_cnn.unfuse_(eager)

    def same(**changes: Any) -> None:
        for m in (model, eager):
            vars(getattr(m, model.fused_stem_pool)).update(changes)
        for gradients in (False, False, True, False):
            with torch.set_grad_enabled(gradients):
                torch.testing.assert_close(model(x), eager(x), **bound)

    before = {name: getattr(pool, name) for name in ("kernel_size", "stride", "padding")}
    same(kernel_size=2, padding=0)
    same(**before)
    same(stride=1)
    same(**before)
    same(stride=1)
    same(**before)
    sizes = [3, 3]
    same(kernel_size=sizes, padding=0)
    sizes[:] = [2, 2]
    same()
    same(stride=None)
    same(stride=[])


@torch.no_grad()
def test_features_come_as_the_image_came(as_on_a_gpu: list[str]) -> None:
    model = timms().to(DEVICE).eval()
    fused_cnn.fuse_(model)
    x = torch.randn(1, 3, 64, 64, device=DEVICE)
    assert model.forward_features(x).is_contiguous()
    y = model.forward_features(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
