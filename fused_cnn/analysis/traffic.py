"""What a call launches, moves, computes and keeps: counted from the ops that really run, and at least.

`count` watches every op that reaches a kernel and charges it by op_costs: the tensors it reads, the tensors it writes,
temporaries included. Floating-point operations come from torch.utils.flop_counter, which the rooms tell of fused ops.
It sees what PyTorch dispatches; kernels that torch.compile generated or that a CUDA graph replays are not dispatched,
so count the function that was compiled or captured. A library's private workspace is not seen. `saved_bytes` weighs
what autograd keeps.

`minimum_traffic` is the least that a network can move block by block, the bound of eager and fused: each block reads
its inputs and its weights once and writes its outputs once; what lies between a block's layers stays on chip.
Convolutions outside a block (the stems), pools and the last layer are blocks of their own; a BatchNorm, ReLU or dropout
after a convolution is part of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .._trees import tensors
from ..ops._cost import tensor_bytes
from .op_costs import cost_of, read_arguments, written_tensors

if TYPE_CHECKING:
    from torch._ops import OpOverload


@dataclass
class Moved:
    """Bytes read and written."""

    bytes_read: int = 0
    bytes_written: int = 0

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written


@dataclass
class OpCounts(Moved):
    """What calls did. `flops` are those of direct convolutions; the algorithms that ran did `flops_saved` fewer
    (Winograd's on the CPU)."""

    launches: int = 0
    flops: int = 0
    flops_saved: int = 0
    calls: int = 0


@dataclass
class Counts(OpCounts):
    """In all and by op; `unknown` names each op not counted, and how often it ran."""

    by_op: dict[str, OpCounts] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self) | {"bytes": self.bytes}


class Counter(TorchDispatchMode):
    """Counts what runs under it."""

    sees_fused_ops = True  # blocks run fused under it

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, parameters = func._schema.name, func._schema.arguments
        given = dict(zip((p.name for p in parameters), args, strict=False)) | (kwargs or {})
        arguments = {p.name: given.get(p.name, p.default_value) for p in parameters}
        cost = cost_of(func, arguments, result)
        if cost is None:
            self.counts.unknown[name] = self.counts.unknown.get(name, 0) + 1
            return result
        if not cost.launches:
            return result
        flops = flop_registry.get(func._overloadpacket)
        counted = 0 if flops is None else int(flops(*args, **(kwargs or {}), out_val=result))
        read = cost.reads_more + sum(
            cost.reads.get(key, 1) * tensor_bytes(t)
            for key, value in read_arguments(func, arguments).items()
            for t in tensors(value)
        )
        written = [tensor_bytes(t) for t in written_tensors(func, arguments, result)]
        again = cost.scratch + (cost.rewrites * written[0] if written else 0)
        for total in (self.counts, self.counts.by_op.setdefault(name, OpCounts())):
            total.calls += 1
            total.launches += cost.launches
            total.bytes_read += read + again
            total.bytes_written += sum(written) + again
            total.flops += counted + cost.flops
            total.flops_saved += cost.flops_saved
        return result


def count(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Counts:
    """Run `fn(*args, **kwargs)` once; count kernel launches, bytes and floating-point operations.

    Backward passes count where `fn` runs them. A first call may fold or pack weights: call `fn` once before, to count
    the steady state.
    """
    with Counter() as counter:
        fn(*args, **kwargs)
    return counter.counts


def saved_bytes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Bytes that autograd keeps for the backward pass of `fn(*args, **kwargs)`, each storage once; an input is, where a
    layer saves it. Parameters are not counted, nor are the buffers of `fn` itself where it is a module."""
    kept: dict[int, torch.UntypedStorage] = {}  # holding a storage keeps its address from being used again

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fn(*args, **kwargs)
    for tensor in (*fn.parameters(), *fn.buffers()) if isinstance(fn, nn.Module) else ():
        kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy without memory that runs plain PyTorch: nothing is computed, every shape and op is real."""
    stand_in = copy.deepcopy(model).to("meta")
    for module in stand_in.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"  # type: ignore[assignment]
    return stand_in.requires_grad_(True)  # with gradients in sight no weights are folded


# By class name: ours, torchvision's and timm's blocks share these.
_BLOCKS = {
    *("Inception", "InceptionA", "InceptionB", "InceptionC", "InceptionD", "InceptionE"),
    *("BasicBlock", "Bottleneck", "ConvBNReLU", "BasicConv2d"),
}
_EPILOGUES = (nn.BatchNorm2d, nn.ReLU, nn.Dropout, nn.Identity)


@dataclass
class BlockTraffic(Moved):
    """One block's least traffic."""

    name: str = ""


@dataclass
class MinimumTraffic(Moved):
    """The blocks in the order in which they ran, and their sums."""

    blocks: list[BlockTraffic] = field(default_factory=list)


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

    def record(name: str, module: nn.Module, given: Any, result: Any) -> None:
        # Weights and biases; BatchNorm's scale and statistics fold into the weights before it.
        parameters = module.named_parameters()
        weights = sum(tensor_bytes(p) for name, p in parameters if p.dim() > 1 or name.endswith("bias"))
        read, written = (sum(tensor_bytes(t) for t in tensors(v)) for v in (given, result))
        block = producer.get(id(given[0])) if isinstance(module, _EPILOGUES) else None
        if block is None:
            block = BlockTraffic(read, written, name)
            if backward:
                block.bytes_read += read + written
                block.bytes_written += read if blocks else 0  # nobody asks for the gradient of the image
            blocks.append(block)
        block.bytes_read += weights * (2 if backward else 1)
        block.bytes_written += weights if backward else 0
        producer.update((id(t), block) for t in tensors(result))
        alive.append(result)

    def watch(name: str, module: nn.Module) -> None:
        if type(module).__name__ in _BLOCKS or next(module.children(), None) is None:
            # A block that is watched runs its layers as they are, so a stem's convolution and BatchNorm are seen too.
            module.register_forward_hook(lambda m, given, result: record(name, m, given, result))
            return
        for child_name, child in module.named_children():
            watch(f"{name}.{child_name}".lstrip("."), child)

    watch("", stand_in)
    stand_in(*[t.to("meta") for t in inputs])
    return MinimumTraffic(sum(b.bytes_read for b in blocks), sum(b.bytes_written for b in blocks), blocks)
