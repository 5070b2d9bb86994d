"""The least memory traffic that a network can do block by block: the bound of eager and fused.

Each fused block reads its inputs and its weights once and writes its outputs once; what lies between a
block's layers stays on chip. Convolutions outside a block (the stems), pools and the last layer are blocks of
their own; a BatchNorm, ReLU or dropout after a convolution is part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .cost import tensor_bytes, tensors_in
from .measure import meta_copy

# By class name: ours, torchvision's and timm's blocks share these.
_BLOCKS = {
    *("Inception", "InceptionA", "InceptionB", "InceptionC", "InceptionD", "InceptionE"),
    *("BasicBlock", "Bottleneck", "ConvBNReLU", "BasicConv2d"),
}
_EPILOGUES = (nn.BatchNorm2d, nn.ReLU, nn.Dropout, nn.Identity)


@dataclass
class BlockTraffic:
    """One block's least traffic in bytes."""

    name: str
    bytes_read: int
    bytes_written: int


@dataclass
class MinimumTraffic:
    """The blocks in the order in which they ran, and their sums in bytes."""

    blocks: list[BlockTraffic]

    @property
    def bytes_read(self) -> int:
        return sum(block.bytes_read for block in self.blocks)

    @property
    def bytes_written(self) -> int:
        return sum(block.bytes_written for block in self.blocks)

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written


def minimum_traffic(model: nn.Module, *inputs: Tensor, backward: bool = False) -> MinimumTraffic:
    """The least bytes that a forward pass (with `backward`, a training step without the optimizer) moves.

    Args:
        model: any module; its mode (train or eval) is kept. It is not changed, and nothing is computed.
        inputs: what the model takes; only shapes and dtypes matter.
        backward: also count, per block, reading grad_out, the input and the weights again and writing their
            gradients. What else a backward needs is, in the limit, recomputed on chip.
    """
    stand_in = meta_copy(model)
    blocks: list[BlockTraffic] = []
    alive: list[Any] = []  # results are told apart by id
    producer: dict[int, BlockTraffic] = {}

    def record(name: str, module: nn.Module, taken: Any, result: Any) -> None:
        weights = _weight_bytes(module)
        read, written = (sum(tensor_bytes(t) for t in tensors_in(v)) for v in (taken, result))
        block = producer.get(id(taken[0])) if isinstance(module, _EPILOGUES) else None
        if block is None:
            block = BlockTraffic(name, read, written)
            if backward:
                block.bytes_read += read + written
                block.bytes_written += read if blocks else 0  # nobody asks for the gradient of the image
            blocks.append(block)
        block.bytes_read += weights * (2 if backward else 1)
        block.bytes_written += weights if backward else 0
        producer.update((id(t), block) for t in tensors_in(result))
        alive.append(result)

    def watch(name: str, module: nn.Module) -> None:
        if type(module).__name__ in _BLOCKS or next(module.children(), None) is None:
            # A block that is watched runs its layers as they are, so a stem's convolution and BatchNorm are
            # seen too.
            module.register_forward_hook(lambda m, taken, result: record(name, m, taken, result))
            return
        for child_name, child in module.named_children():
            watch(f"{name}.{child_name}".lstrip("."), child)

    watch("", stand_in)
    stand_in(*[t.to("meta") for t in inputs])
    return MinimumTraffic(blocks)


def _weight_bytes(module: nn.Module) -> int:
    """Weights and biases; BatchNorm's scale and statistics fold into the weights before it."""
    parameters = module.named_parameters()
    return sum(tensor_bytes(p) for name, p in parameters if p.dim() > 1 or name.endswith("bias"))
