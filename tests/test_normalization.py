"""fold_normalization: what a convolution gives for images is what it gave for normalised ones."""

from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import weight_norm

from fused_cnn import fold_normalization, fuse_
from fused_cnn.nn import ConvBNReLU

MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.25)  # ImageNet's, and a fourth channel's


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"bias": False, "stride": 2},
        {"groups": 2},
        {"groups": 4, "bias": False},
        {"padding": "valid"},
        {"padding": 1, "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_it_gives_for_images_what_it_gave_for_normalised_ones(how: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 8, 3, **how).double()
    images = torch.rand(2, 4, 9, 8, dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (MEAN, STD))
    expected = conv((images - mean) / std)
    fold_normalization(conv, MEAN, STD)
    torch.testing.assert_close(conv(images), expected, rtol=1e-12, atol=1e-12)  # the order of sums


def test_a_standard_deviation_alone_folds_under_any_padding() -> None:
    conv = nn.Conv2d(4, 8, 7, 2, 3, bias=False).double()
    images = torch.rand(2, 4, 20, 18, dtype=torch.float64)
    expected = conv(images / torch.tensor(STD, dtype=torch.float64).view(-1, 1, 1))
    fold_normalization(conv, [0] * 4, STD)
    assert conv.bias is None
    torch.testing.assert_close(conv(images), expected, rtol=1e-12, atol=1e-12)


def test_a_fused_block_follows() -> None:
    block = ConvBNReLU(4, 8, kernel_size=3).to(DEVICE).eval()
    net = nn.Sequential(block).eval()
    fuse_(net)
    images = torch.rand(2, 4, 9, 8, device=DEVICE)
    mean, std = (torch.tensor(values, device=DEVICE).view(-1, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        expected = net((images - mean) / std)
        fold_normalization(block.conv, MEAN, STD)
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)  # float32, values of up to 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Linear(3, 3), MEAN[:3], STD[:3]), TypeError, "must be an nn.Conv2d, got .*Linear"),
        ((weight_norm(nn.Conv2d(3, 8, 3)), MEAN[:3], STD[:3]), TypeError, "weight must be a plain parameter"),
        ((nn.LazyConv2d(8, 3), MEAN[:3], STD[:3]), TypeError, "got UninitializedParameter"),
        ((nn.Conv2d(3, 8, 3), MEAN[:2], STD[:3]), ValueError, "mean must be 3 finite numbers.*got"),
        ((nn.Conv2d(3, 8, 3), MEAN[:3], (1.0, float("nan"), 1.0)), ValueError, "std must be 3 finite numbers"),
        ((nn.Conv2d(3, 8, 3), MEAN[:3], (0.2, 0.0, 0.2)), ValueError, "std must be positive"),
        ((nn.Conv2d(3, 8, 3, padding=1), MEAN[:3], STD[:3]), ValueError, "pads with zeros .*got mean"),
        ((nn.Conv2d(3, 8, 3, padding="same"), MEAN[:3], STD[:3]), ValueError, "pads with zeros"),
    ],
)
def test_bad_input_changes_nothing(arguments: Any, error: type[Exception], message: str) -> None:
    before = [p.clone() for p in arguments[0].parameters() if not is_lazy(p)]
    with pytest.raises(error, match=message):
        fold_normalization(*arguments)
    after = [p for p in arguments[0].parameters() if not is_lazy(p)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_it_folds_what_has_no_values_yet() -> None:
    conv = nn.Conv2d(3, 8, 3, bias=False, device="meta")
    fold_normalization(conv, MEAN[:3], STD[:3])
    assert conv.bias is not None and conv.bias.is_meta
