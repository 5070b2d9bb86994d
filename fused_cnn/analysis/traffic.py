"""Kernel launches and memory traffic of a call, counted from the ops that really run.

`count` watches every op that reaches a kernel and charges it by op_costs: the tensors it reads, the tensors
it writes, temporaries included. Floating-point operations come from torch.utils.flop_counter and, for fused
ops, from their weights. It sees what PyTorch dispatches; kernels that torch.compile generated or that a CUDA
graph replays are not dispatched, so count the function that was compiled or captured. A library's private
workspace is not seen. `saved_bytes` weighs what autograd keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .cost import tensor_bytes, tensors_in
from .op_costs import cost_of, read_arguments, written_tensors

if TYPE_CHECKING:
    from torch._ops import OpOverload


@dataclass
class OpCounts:
    """The calls of one op: kernels launched, bytes read and written, floating-point operations."""

    calls: int = 0
    launches: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    flops: int = 0


@dataclass
class Counts:
    """What a call did, in all and by op; `unknown` names each op not counted, and how often it ran."""

    launches: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    flops: int = 0
    by_op: dict[str, OpCounts] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes read and written together."""
        return self.bytes_read + self.bytes_written

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self) | {"bytes": self.bytes}


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = flop_registry.get(func._overloadpacket)
        flops = 0 if known is None else int(known(*args, **(kwargs or {}), out_val=result))
        self._add(func, _by_name(func, args, kwargs or {}), result, flops)
        return result

    def _add(self, op: OpOverload, args: dict[str, Any], result: Any, flops: int) -> None:
        name = op._schema.name
        cost = cost_of(op, args)
        if cost is None:
            self.counts.unknown[name] = self.counts.unknown.get(name, 0) + 1
            return
        if not cost.launches:
            return
        arguments = read_arguments(op, args).items()
        read = cost.reads_more + sum(cost.reads.get(key, 1) * tensor_bytes(t) for key, value in arguments for t in tensors_in(value))
        written = [tensor_bytes(t) for t in written_tensors(op, args, result)]
        again = cost.scratch + (cost.rewrites * written[0] if written else 0)
        for total in (self.counts, self.counts.by_op.setdefault(name, OpCounts())):
            total.launches += cost.launches
            total.bytes_read += read + again
            total.bytes_written += sum(written) + again
            total.flops += flops + cost.flops
        self.counts.by_op[name].calls += 1


def _by_name(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every argument by its name in the schema, defaults included, in order."""
    named = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
    return {a.name: named.get(a.name, a.default_value) for a in op._schema.arguments}


def count(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Counts:
    """Run `fn(*args, **kwargs)` once; count kernel launches, bytes and floating-point operations.

    Backward passes count where `fn` runs them. A first call may fold or pack weights: call `fn` once before,
    to count the steady state.
    """
    with _Counter() as counter:
        fn(*args, **kwargs)
    return counter.counts


def saved_bytes(fn: Callable[..., Any], *args: Any, model: nn.Module | None = None, **kwargs: Any) -> int:
    """Bytes that autograd keeps for the backward pass of `fn(*args, **kwargs)`, each storage once.

    Parameters and buffers are not counted: those of `model`, or of `fn` itself where it is a module. The
    input is, where a layer saves it.
    """
    owner = fn if isinstance(fn, nn.Module) else model
    own = set() if owner is None else {_storage(t) for t in (*owner.parameters(), *owner.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, nn.Parameter) and _storage(tensor) not in own:
            storage = tensor.untyped_storage()
            kept[_storage(tensor)] = storage  # holding it keeps its address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fn(*args, **kwargs)
    return sum(storage.nbytes() for storage in kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
