"""Whole networks, eager and fused, by the contract of `fused-cnn verify`: scores, and every gradient and statistic of a
training step.

On a GPU in every dtype and layout. Elsewhere one network in what tests/test_fuse.py does not have: real statistics, and
a step under autocast.
"""

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from conftest import DEVICE
from torch import Tensor, nn

from fused_cnn.bench.networks import make_statistics_real, photographs
from fused_cnn.bench.numbers import Autocast, Pair, compare_scores, compare_training

GPU = DEVICE == "cuda"
SIDE = 160 if GPU else 64  # of the images: in a last map of few positions one activation is a large share of a gradient
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
    "googlenet": lambda: torchvision.models.googlenet(weights=None, init_weights=False),
    "inception_v3": lambda: torchvision.models.inception_v3(weights=None, init_weights=False, aux_logits=False),
    "timm resnet26": lambda: timm.create_model("resnet26"),
}
# Of BatchNorm. Where ReLU bends half of all activations, as around 0, each layer of a random network widens what
# rounding did by more than it widens what tells images apart: in bfloat16 the scores of eager ResNet-50 and Inception
# v3 are then themselves 0.1 to 0.6 off, of noise 0.8, and say nothing. Around this they are 0.05 to 0.15 off.
BETA = 0.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

each_network = pytest.mark.parametrize("name", NETWORKS if GPU else ["resnet18"])
each_layout = pytest.mark.parametrize(
    "layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"]
)


def network(name: str, layout: torch.memory_format) -> tuple[nn.Module, Tensor]:
    """A network that has seen images like these, and some of them. One activation that falls on the other side of
    ReLU's kink moves a gradient by its share of all: of four images, and on an H100 of twelve, it was once more than
    the bound allows."""
    images = photographs(24 if GPU else 4, SIDE).to(DEVICE).contiguous(memory_format=layout)
    model = NETWORKS[name]().to(DEVICE, memory_format=layout)  # type: ignore[call-overload]
    with torch.no_grad():
        make_statistics_real(model, images, BETA)
    return model, images


@each_network
@each_layout
@pytest.mark.parametrize("dtype", DTYPES if GPU else ["float32"])
def test_scores_agree(name: str, dtype: str, layout: torch.memory_format) -> None:
    model, images = network(name, layout)
    (number,), _ = compare_scores(Pair.of(model.to(DTYPES[dtype]), None), images.to(DTYPES[dtype]))
    assert number.ok, number


@each_network
@pytest.mark.parametrize(
    "layout", [torch.channels_last, torch.contiguous_format] if GPU else [torch.channels_last], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES if GPU else ["bfloat16"])
def test_a_training_step_agrees(name: str, dtype: str, layout: torch.memory_format) -> None:
    """In 16 bits under autocast, as people train."""
    model, images = network(name, layout)
    pair = Pair.of(model, None)
    if dtype != "float32":
        pair = Pair(Autocast(pair.eager, DTYPES[dtype]), Autocast(pair.fused, DTYPES[dtype]), pair.report)
    numbers, in_float64 = compare_training(pair, images, in_float64=dtype == "float32")
    assert numbers
    for number in [*numbers, *in_float64]:
        assert number.ok, number
