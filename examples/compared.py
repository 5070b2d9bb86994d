"""What the examples of torch.compile, packages and ONNX have in common: a network with photographs for it, the
comparison with what the eager network answers, and the times."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fused_cnn.bench import networks
from fused_cnn.measure import Work, interleaved
from fused_cnn.testing import relative

# Of the largest score. Float32 sums of thousands of products, in another order through fifty layers, are some 1e-5 off;
# a wrong weight moves scores by far more.
AGREES = 1e-3


def network(name: str, batch: int, size: int, device: str = "cpu") -> tuple[nn.Module, Tensor]:
    """A torchvision network in eval, and so many photographs."""
    statistics = networks.photographs(len(networks.PHOTOGRAPHS), size).to(device)
    return networks.network(name, statistics), networks.photographs(batch, size).to(device)


def agree(what: str, scores: Tensor, eager: Tensor) -> None:
    """Say how far scores are off; end the program with exit code 1 where that is more than rounding."""
    off = relative(scores.cpu(), eager.cpu())
    print(f"{what}: the scores differ from eager's by {off:.1e} of the largest at most", flush=True)
    if not off <= AGREES:
        raise SystemExit(f"{what}: that is more than {AGREES:.0e}")


def times(batch: int, works: Mapping[str, Work], seconds: float, device: str = "cpu") -> None:
    """Print the median milliseconds of each, of so many seconds' rounds in which all take turns."""
    found = interleaved(works, device, seconds)
    print(f"batch {batch}: {', '.join(f'{name} {t.median * 1e3:.1f} ms' for name, t in found.items())}", flush=True)


def forward(model: nn.Module, images: Tensor) -> Work:
    return torch.no_grad()(lambda: model(images))
