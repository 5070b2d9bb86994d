"""What a call of a fused block costs before any work: the look at whether the block is what it was, in microseconds.

Run without arguments. For each network: of its whole forward pass, a block (what runs as one op is looked at as one),
and of one block by itself. Medians of many rounds; a network's blocks are those of `fuse_`'s report.
"""

import statistics
import timeit
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor, nn

from fused_cnn import fuse_, models
from fused_cnn.nn import FusedModule, Inception, MaxPool2d, ResidualStage
from fused_cnn.nn.calls import kind_of
from fused_cnn.nn.residual import ResidualBlock

NETWORKS = ("resnet18", "resnet50", "googlenet")


def microseconds(work: Callable[[], object], calls: int = 1000, rounds: int = 21) -> float:
    return statistics.median(timeit.repeat(work, number=calls, repeat=rounds)) / calls * 1e6


def looked_at(model: nn.Module, images: Tensor) -> list[tuple[FusedModule, Tensor]]:
    """What looks at itself in a forward pass, each with its input."""
    found: list[tuple[FusedModule, Tensor]] = []

    def recording(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def record(self: FusedModule, x: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
            found.append((self, x))
            return run(self, x, plain)

        return record

    with ExitStack() as patches:
        for kind in (FusedModule, MaxPool2d):
            patches.enter_context(mock.patch.object(kind, "fused_run", recording(kind.fused_run)))
        model(images)
    return found


def look(module: FusedModule, x: Tensor) -> object:
    return (kind_of(x), module.fused_known()) if isinstance(module, MaxPool2d) else module.fused_ready(x)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    for name in NETWORKS:
        model = models.build(name, backend="reference").eval().to(memory_format=torch.channels_last)
        blocks = len(fuse_(model).fused)
        images = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
        model(images)
        found = looked_at(model, images)
        model(images)
        total = microseconds(lambda: [look(m, x) for m, x in found])  # noqa: B023
        print(f"{name}: {total:.1f} us for {blocks} blocks, {total / blocks:.2f} us a block")
        stages = [m for m, _ in found if isinstance(m, ResidualStage)]
        single = stages[0][1] if stages else next(m for m, _ in found if isinstance(m, Inception))
        assert isinstance(single, (ResidualBlock, Inception))
        x = torch.randn(1, single.fused_pairs()[0][0].in_channels, 8, 8)
        single(x)
        print(f"  {type(single).__name__} by itself: {microseconds(lambda: single.fused_ready(x)):.2f} us")  # noqa: B023


if __name__ == "__main__":
    main()
