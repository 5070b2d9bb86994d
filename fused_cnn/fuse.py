"""fuse_(model) swaps the blocks that it knows for fused ones, in place; unfuse_(model) puts them back.

One recursive walk: a child whose class is in a table is replaced by what the table's builder returns, over the very
same parameters and buffers; all else is walked into. A network whose stem sits at its top level keeps its identity and
gets a class of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import nn

from ._backends import BACKENDS, outlook
from .adapters import BLOCKS, NETWORKS
from .adapters._common import full_name
from .nn import BasicBlock, Bottleneck, FusedModule, ResidualStage

Filter = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Entry:
    """One module of the report: its name in the model, its class, and why it was fused or not."""

    name: str
    module: str
    reason: str


@dataclass
class FusionReport:
    """What fuse_ did: `fused` and `skipped` list one Entry for each block that was looked at; `runs` says which backend
    will run on the model's device, and what is missing for a better one."""

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


def _restore_swapped(mixin: type[FusedModule], base: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = nn.Module.__new__(_swapped_class(mixin, base))
    module.__setstate__(state)
    return module


def _swapped_class(mixin: type[FusedModule], base: type[nn.Module]) -> type[nn.Module]:
    """`base` with the mixin's forward: the class that a fused network's instance gets. It pickles by its parents."""

    def reduce(self: FusedModule, protocol: int) -> tuple[Any, ...]:
        return _restore_swapped, (mixin, base, self.__getstate__())

    body = {"__reduce_ex__": reduce, "__module__": base.__module__, "_swapped_from": base}
    return type(f"Fused{base.__name__}", (mixin, base), body)


def fuse_(
    model: nn.Module, *, backend: str | None = None, filter_fn: Filter | None = None, strict: bool = False
) -> FusionReport:
    """Swap the blocks of `model` for fused ones, in place: same parameters, same names, same numbers.

    What is not fully understood is left as it is: a subclass of a known block, hooks on an inner module, an activation
    other than ReLU, squeeze-and-excitation, anti-aliasing, drop-path. Hooks on a block itself are kept.

    Args:
        model: a torchvision or timm model, one that contains their blocks, or fused_cnn's own models made with
            backend="reference". Its root must be a network, not a bare block (use the block's `from_reference`).
        backend: for the fused blocks: "reference", "native", "triton", or None for the best at hand.
        filter_fn: called with a block's name and module; False leaves the block as it is.
        strict: raise ValueError, changing nothing more, when nothing was fused.

    Returns:
        A FusionReport; print it for a table.

    Raises:
        ValueError: an unknown backend, or nothing fused with strict=True.
    """
    if backend not in (None, "auto", *BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None (auto), got {backend!r}")
    weight = next(chain(model.parameters(), model.buffers()), None)
    report = FusionReport(runs="" if weight is None else outlook(backend, weight.device))
    _Walk(backend, filter_fn, report).visit("", model)
    if strict and not report.fused:
        raise ValueError(f"fuse_: nothing in {type(model).__name__} could be fused\n{report}")
    return report


@dataclass
class _Walk:
    backend: str | None
    filter_fn: Filter | None
    report: FusionReport
    made: dict[nn.Module, nn.Module] = field(default_factory=dict)  # a block that is used twice stays one block

    def visit(self, name: str, module: nn.Module) -> None:
        """Fuse what is inside the module, and its stem where it is a network that has one."""
        if full_name(type(module)) in NETWORKS and self._is_wanted(name, module):
            self._swap(name, module)
        elif isinstance(module, ResidualStage) and module.backend == "reference":
            module.backend = self.backend  # its blocks are asked for and reported
        elif isinstance(module, FusedModule) and module.backend == "reference" and self._is_wanted(name, module):
            module.backend = self.backend
            self.report.fused.append(Entry(name, type(module).__name__, f"backend {self.backend or 'auto'}"))
        for child_name, child in list(module._modules.items()):
            if child is not None:
                module._modules[child_name] = self._fused(f"{name}.{child_name}" if name else child_name, child)

    def _fused(self, name: str, module: nn.Module) -> nn.Module:
        """What takes the module's place: its fused form, or the module itself, with what is inside it fused."""
        if module in self.made:
            return self.made[module]
        build = BLOCKS.get(full_name(type(module)))
        if build is not None:
            if not self._is_wanted(name, module):
                return module
            made = build(module, self.backend)
            if isinstance(made, nn.Module):
                self.report.fused.append(Entry(name, type(module).__name__, type(made).__name__))
                self.made[module] = made
                return made
            self._skip(name, module, made)
        else:
            parent = next((p for p in type(module).__mro__[1:] if full_name(p) in BLOCKS), None)
            if parent is not None:
                self._skip(name, module, f"a subclass of {parent.__name__}, whose forward may differ")
        self.visit(name, module)
        blocks = list(module) if type(module) is nn.Sequential else []
        if len(blocks) > 1 and all(type(b) in (BasicBlock, Bottleneck) for b in blocks):
            self.made[module] = ResidualStage.from_reference(module, backend=self.backend)  # no entry of its own
        return self.made.get(module, module)

    def _swap(self, name: str, module: nn.Module) -> None:
        mixin, base = NETWORKS[full_name(type(module))], type(module)
        problem = mixin.problem(module)
        if problem is not None:
            self._skip(name or "(stem)", module, problem)
            return
        module.__class__ = _swapped_class(mixin, base)
        module.backend = self.backend  # type: ignore[assignment]
        self.report.fused.append(Entry(f"{name}.conv1" if name else "conv1", base.__name__, "stem"))

    def _is_wanted(self, name: str, module: nn.Module) -> bool:
        if self.filter_fn is None or self.filter_fn(name, module):
            return True
        self._skip(name, module, "left out by filter_fn")
        return False

    def _skip(self, name: str, module: nn.Module, reason: str) -> None:
        self.report.skipped.append(Entry(name, type(module).__name__, reason))


def unfuse_(model: nn.Module) -> nn.Module:
    """Undo fuse_, in place: every fused block becomes the block that it was made from, over today's parameters.

    Returns the model itself. fused_cnn's own blocks go back to backend="reference".
    """
    base = getattr(type(model), "_swapped_from", None)
    if base is not None:
        model.__class__ = base
        model.__dict__.pop("backend")
        model.__dict__.pop("_cache", None)
    elif isinstance(model, FusedModule):
        model.backend = "reference"
    for name, child in list(model._modules.items()):
        if isinstance(child, FusedModule) and child._original:
            model._modules[name] = child = child.to_reference()
        if child is not None:
            unfuse_(child)
    return model
