"""The architectures by name. Every builder takes `num_classes`, `backend` and the options of its class."""

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .googlenet import GoogLeNet, GoogLeNetOutputs, googlenet, googlenet_loss, googlenet_paper
from .resnet import (
    ResNet,
    plain18,
    plain34,
    resnet18,
    resnet34,
    resnet50,
    resnet50_paper,
    resnet101,
    resnet101_paper,
    resnet152,
    resnet152_paper,
    resnet_cifar,
    resnext50_32x4d,
    wide_resnet50_2,
)

__all__ = ["MODELS", "GoogLeNet", "GoogLeNetOutputs", "ResNet", "build", "googlenet_loss", "input_size"]

_BUILDERS: tuple[Callable[..., nn.Module], ...] = (
    *(googlenet, googlenet_paper),
    *(resnet18, resnet34, resnet50, resnet101, resnet152),
    *(resnet50_paper, resnet101_paper, resnet152_paper),
    *(wide_resnet50_2, resnext50_32x4d, plain18, plain34),
)
_CIFAR_DEPTHS = (20, 32, 44, 56, 110)

MODELS: dict[str, Callable[..., nn.Module]] = {
    **{builder.__name__: builder for builder in _BUILDERS},
    **{f"resnet{depth}_cifar": partial(resnet_cifar, depth) for depth in _CIFAR_DEPTHS},
    **{f"plain{depth}_cifar": partial(resnet_cifar, depth, residual=False) for depth in _CIFAR_DEPTHS},
}
__all__ += MODELS  # every name is an attribute of this module as well
globals().update(MODELS)


def build(name: str, **options: Any) -> nn.Module:
    """The model of that name in MODELS.

    Raises:
        ValueError: there is no such model; the message names the nearest ones.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3)
        raise ValueError(f"no model {name!r}; {'did you mean' if near else 'there are'} {', '.join(near or MODELS)}")
    return MODELS[name](**options)


def input_size(name: str) -> tuple[int, int, int]:
    """(C, H, W) of the images on which the papers count a model's operations."""
    return (3, 32, 32) if name.endswith("_cifar") else (3, 224, 224)
