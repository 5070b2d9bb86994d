"""A normalisation of images folded into the convolution that takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def fold_normalization(conv: nn.Conv2d, mean: Sequence[float], std: Sequence[float]) -> None:
    """Change a network's first convolution so that it gives for images what it gave for (images - mean) / std.

    The pass over the images that normalised them is not needed any more. Exact but for the rounding of the new weights,
    which are computed in float64. What shares the convolution's parameters changes with it.

    Args:
        conv: the convolution, changed in place: its weight, and its bias, which is added where there is none and a mean
            is not zero.
        mean, std: one of each input channel, as torchvision.transforms.Normalize takes them, in the images' own units:
            255 times those for values of 0 to 1, where pixels are 0 to 255.

    Raises:
        TypeError: conv is no Conv2d, or its weight or bias no plain parameter of it, as under a parametrisation.
        ValueError: not one mean and one std for each input channel, one that is not finite, a std that is not positive;
            or conv pads with zeros, which stand for the mean behind a normalisation and for black before it: fold the
            standard deviation alone there (mean 0), and subtract the mean before.
    """
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"conv must be an nn.Conv2d, got {type(conv).__module__}.{type(conv).__name__}")
    for name in ("weight", "bias"):
        held = conv._parameters.get(name)
        if type(held) is not nn.Parameter and (name == "weight" or getattr(conv, name, None) is not None):
            raise TypeError(
                f"conv's {name} must be a plain parameter of it, got {type(held).__name__}: is it computed?"
            )
    scale, shift = _checked("std", std, conv.in_channels), _checked("mean", mean, conv.in_channels)
    if not (scale > 0).all():
        raise ValueError(f"std must be positive, got {list(std)}")
    shifts = bool(shift.any())
    pads = conv.padding != "valid" if isinstance(conv.padding, str) else any(conv.padding)
    if pads and conv.padding_mode == "zeros" and shifts:
        raise ValueError(
            f"conv pads with zeros (padding={conv.padding}), which are not normalised: got mean={list(mean)}; "
            "subtract it from the images and pass mean=0 for each channel"
        )
    # Of each group's channels, beside the weights of its outputs.
    scale, shift = (t.to(conv.weight.device).view(conv.groups, 1, -1, 1, 1) for t in (scale, shift))
    with torch.no_grad():
        wide = conv.weight.double().unflatten(0, (conv.groups, -1)) / scale
        conv.weight.copy_(wide.flatten(0, 1))
        if not shifts:
            return
        bias = -(wide * shift).sum((2, 3, 4)).flatten()
        if conv.bias is not None:
            conv.bias.copy_(conv.bias.double() + bias)
        else:
            conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)


def _checked(name: str, values: Sequence[float], channels: int) -> Tensor:
    found = torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu")
    if found.numel() != channels or not found.isfinite().all():
        raise ValueError(f"{name} must be {channels} finite numbers, one of each input channel, got {list(values)}")
    return found
