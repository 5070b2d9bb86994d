"""fuse_(model) has the blocks that it knows run fused, in place; unfuse_(model) undoes it.

One recursive walk: a module whose class is in a table (adapters/) gets a class of its own, which runs it fused, over
the very same children, parameters and buffers. The object stays what it is to whoever holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ._backends import BACKENDS, outlook
from ._layout import asks_for_channels_last
from .adapters import BLOCKS, NETWORKS, NETWORKS_OF_BLOCKS
from .adapters._common import full_name
from .nn import FusedModule, ResidualStage
from .nn.cache import mark_stale
from .nn.residual import ResidualBlock
from .nn.stem import BlockStemmedNetwork
from .nn.swap import swap, swap_problem, unswap

Filter = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Entry:
    """One module of the report: its name in the model, its class, and why it was fused or not."""

    name: str
    module: str
    reason: str


_IN_PLACE = (
    "fuse_ changes the model in place and returns a report; write `report = fuse_(model)` and go on with `model`"
)


@dataclass
class FusionReport:
    """What fuse_ did: `fused` and `skipped` list one Entry for each block that was looked at; `runs` says which backend
    will run on the model's device, and what is missing for a better one, a layout among it."""

    fused: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)
    runs: str = ""

    def __str__(self) -> str:
        rows = [("", "name", "module", "reason")]
        rows += [("fused", e.name, e.module, e.reason) for e in self.fused]
        rows += [("skipped", e.name, e.module, e.reason) for e in self.skipped]
        width = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join((*map(str.ljust, row, width), row[3])).rstrip() for row in rows]
        head = f"{len(self.fused)} fused, {len(self.skipped)} skipped"
        return "\n".join((head, *([self.runs] if self.runs else []), *lines))

    def __getattr__(self, name: str) -> Any:
        """What is asked of a report as if it were the model."""
        raise AttributeError(f"a FusionReport has no {name!r}: {_IN_PLACE}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"a FusionReport is not the model: {_IN_PLACE}")

    __iter__ = __len__ = __getitem__ = __call__  # of an nn.Sequential; or of a pair (model, report)

    def __bool__(self) -> bool:  # which would ask __len__
        return True


def fuse_(
    model: nn.Module, *, backend: str | None = None, filter_fn: Filter | None = None, strict: bool = False
) -> FusionReport:
    """Have the blocks of `model` run fused, in place: same objects, same parameters, same names, same numbers.

    What is not fully understood is left as it is: a subclass of a known block, hooks on an inner module, an activation
    other than ReLU, squeeze-and-excitation, anti-aliasing, drop-path. Hooks on a block itself are kept. What becomes of
    a block later is looked at in every call: where its fused form would not do what its modules now do (an activation
    replaced, a hook, a forward of its own), they run as they are.

    In eval without gradients weights are folded once and kept. A changed weight is seen at the next call, whoever
    changed it, as long as PyTorch's version counters or an optimizer's step tell, or on a CPU the first eight bytes of
    its memory; for changes past them (through `.data`, a view of NumPy or DLPack, another process, a collective) there
    is `refresh`.

    Args:
        model: a torchvision or timm model, one that contains their blocks, such a block, or fused_cnn's own models made
            with backend="reference".
        backend: for the fused blocks: "reference", "native", "triton", or None for the best at hand.
        filter_fn: called with a block's name and module; False leaves the block as it is.
        strict: raise ValueError, changing nothing more, when nothing was fused.

    Returns:
        A FusionReport; print it for a table.

    Raises:
        TypeError: `model` is not an nn.Module, or `filter_fn` cannot be called.
        ValueError: an unknown backend, or nothing fused with strict=True.
    """
    _check_module("fuse_", model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"fuse_: filter_fn must be a function of a block's name and module, got {filter_fn!r}")
    if backend not in (None, "auto", *BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None (auto), got {backend!r}")
    weight = next(chain(model.parameters(), model.buffers()), None)
    report = FusionReport()
    _Walk(backend, filter_fn, report).visit("", model)
    if weight is not None:
        report.runs = outlook(backend, weight.device, _advice(model) if report.fused else "")
    if strict and not report.fused:
        raise ValueError(f"fuse_: nothing in {type(model).__name__} could be fused\n{report}")
    return report


def _advice(model: nn.Module) -> str:
    """What would make the fused kernels faster: as in eager, what comes in contiguous stays so behind contiguous
    weights, and each op copies it to channels_last and back."""
    weights = [p for p in model.parameters() if not is_lazy(p) and p.dim() == 4]
    if not weights or any(map(asks_for_channels_last, weights)):
        return ""
    return "its weights are contiguous: model.to(memory_format=torch.channels_last) makes it faster"


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"{function}: model must be an nn.Module, got {got}")


@dataclass
class _Walk:
    backend: str | None
    filter_fn: Filter | None
    report: FusionReport
    seen: set[nn.Module] = field(default_factory=set)  # a block that is used twice is one block

    def visit(self, name: str, module: nn.Module) -> None:
        """Fuse the module, or what is inside of it."""
        if module in self.seen:
            return
        self.seen.add(module)
        if isinstance(module, FusedModule):
            self._visit_own(name, module)
        else:
            mixin = BLOCKS.get(full_name(type(module)))
            if mixin is not None and (not self._is_wanted(name, module) or self._swap(name, module, mixin)):
                return
            parent = next((p for p in type(module).__mro__[1:] if full_name(p) in BLOCKS), None)
            if parent is not None:
                self._skip(name, module, f"a subclass of {parent.__name__}, whose forward may differ")
            network = NETWORKS.get(full_name(type(module)))
            if network is not None and self._is_wanted(name, module):
                self._swap_stem(name, module, network)
        for child_name, child in module.named_children():
            self.visit(f"{name}.{child_name}" if name else child_name, child)
        of_blocks = None if isinstance(module, FusedModule) else NETWORKS_OF_BLOCKS.get(full_name(type(module)))
        wanted = self.filter_fn is None or self.filter_fn(name, module)
        if of_blocks is not None and wanted and swap_problem(module) is None:  # no entry of its own
            swapped = swap(module, of_blocks, self.backend)
            if swapped.fused_structure_problem() is not None:
                unswap(swapped)
        blocks = list(module.children()) if type(module) is nn.Sequential else []
        if len(blocks) > 1 and all(isinstance(b, ResidualBlock) for b in blocks) and swap_problem(module) is None:
            swap(module, ResidualStage, self.backend)  # no entry of its own, either

    def _visit_own(self, name: str, module: FusedModule) -> None:
        """fused_cnn's own modules, where they are in plain PyTorch."""
        if module._fused_swapped_from is not None or module.backend != "reference":
            return
        if isinstance(module, (ResidualStage, BlockStemmedNetwork)):
            module.backend = self.backend  # its blocks are asked for and reported
        elif self._is_wanted(name, module):
            module.backend = self.backend
            self.report.fused.append(Entry(name, type(module).__name__, f"backend {self.backend or 'auto'}"))

    def _swap(self, name: str, module: nn.Module, mixin: type[FusedModule]) -> bool:
        """Fuse a block with all that it consists of; False, and nothing changed, where it cannot be."""
        kind = type(module).__name__
        parts = [m for m in module.modules() if full_name(type(m)) in BLOCKS and not isinstance(m, FusedModule)]
        taken = next(filter(None, map(swap_problem, parts)), None)
        if taken is not None:
            self._skip(name, module, taken)
            return False
        fused = [swap(m, BLOCKS[full_name(type(m))], self.backend) for m in reversed(parts)]
        problem = next((p for p in (m.fused_structure_problem() for m in fused) if p), None)
        if problem is None:
            self.report.fused.append(Entry(name, kind, mixin.__name__))
            self.seen.update(module.modules())
            return True
        for m in fused:
            unswap(m)
        self._skip(name, module, problem)
        return False

    def _swap_stem(self, name: str, module: nn.Module, mixin: type[FusedModule]) -> None:
        kind, problem = type(module).__name__, swap_problem(module)
        if problem is None:
            problem = swap(module, mixin, self.backend).fused_structure_problem()
            if problem is None:
                self.report.fused.append(Entry(f"{name}.conv1" if name else "conv1", kind, "stem"))
                return
            unswap(module)  # type: ignore[arg-type]
        self._skip(name or "(stem)", module, problem)

    def _is_wanted(self, name: str, module: nn.Module) -> bool:
        if self.filter_fn is None or self.filter_fn(name, module):
            return True
        self._skip(name, module, "left out by filter_fn")
        return False

    def _skip(self, name: str, module: nn.Module, reason: str) -> None:
        self.report.skipped.append(Entry(name, type(module).__name__, reason))


def unfuse_(model: nn.Module) -> nn.Module:
    """Undo fuse_, in place: every block is of its own class again, with today's parameters, hooks and attributes.

    Returns the model itself. fused_cnn's own blocks go back to backend="reference".

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError, changing nothing: a block has been given another class since (as fully_shard and parametrizations
            do), which must be undone first.
    """
    _check_module("unfuse_", model)
    fused = [m for m in model.modules() if isinstance(m, FusedModule)]
    for module in fused:
        if module._fused_swapped_from is not None and "_fused_swapped_from" not in vars(type(module)):
            raise ValueError(
                f"unfuse_: a {module._fused_swapped_from.__name__} has become a {type(module).__name__} since fuse_; "
                "undo that first"
            )
    for module in fused:
        if module._fused_swapped_from is None:
            module.backend = "reference"
        else:
            unswap(module)
    return model


def refresh(model: nn.Module) -> nn.Module:
    """Have the folded weights of `model` made again, after a change that PyTorch does not see.

    Optimizers, load_state_dict, `.to()` and every in-place operation of PyTorch's are seen without it. Call it behind a
    collective or a copy into `p.data` (and a second `vector_to_parameters` of one vector, which is one), behind
    F.batch_norm in training with a module's statistics, a write through a view of NumPy, DLPack or an untyped storage,
    and a change that another process made in shared memory. On a CPU most of these are seen without it, too: those that
    change the first eight bytes of a tensor. `detect_stale_weights` finds where a call is missing. Weights that a CUDA
    graph reads are made again in their place, so that its replays see them.

    Args:
        model: anything with fused blocks in it, also a module that torch.compile or torch.export made of one.

    Returns:
        The model itself.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    _check_module("refresh", model)
    mark_stale(chain(model.parameters(), model.buffers()))
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.fused_refill_captured()
    return model
