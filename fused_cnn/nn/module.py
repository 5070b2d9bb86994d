"""FusedModule: what the fused blocks share: when a block may run fused, in which form, and when the forward that it
replaces runs instead.

A fused block skips its children's forward, so it must know that nobody would notice: that they are what it takes them
for, with nobody's hooks on them and nothing of theirs replaced. It understands that once, and a snapshot is compared at
every call (snapshot.py). In eval without gradients BatchNorm is folded into the convolutions, once (cache.py). In
training, and in eval with gradients, the convolution is cuDNN's or oneDNN's, and BatchNorm, the addition and the ReLU
are one fused op.

fuse_ gives a foreign block a class of its own, made of the fused one and the block's (swap.py): the object
stays what it is to everybody who holds it, with its attributes, buffers and hooks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .._candidates import is_recording, transforms_active
from ..ops import BatchNormArgs, bn_relu, bn_relu_conv
from ..ops._conv import autocast_dtype, on_16_bytes
from .cache import Form, Kind, Owner, detect_stale_weights
from .calls import is_traced, kind_of, pays_on_cpu
from .fold import (
    Pair,
    can_be_constant,
    geometry,
    has_running_statistics,
    is_own,
    pair_settings,
    sources_of,
    wants_gradient,
)
from .snapshot import ADDING, CALLS, COMPUTING, Method, Snapshot, call_problem, hooks, replaced_for_all, watched_by_all

Self = TypeVar("Self", bound="FusedModule")
Replaced = Mapping[str, frozenset[str]]  # methods of a foreign class, and the names that they may use


class Understanding(NamedTuple):
    """What a block found itself to be."""

    snapshot: Snapshot
    problem: str | None  # why the forward that it replaces runs
    has: tuple[str, ...]
    pairs: list[Pair]
    folds: bool  # whether the weights may be folded and kept
    tensors: list[Tensor]


class FusedModule(nn.Module):
    """What runs its convolutions with what follows them as fused ops.

    A subclass says what it consists of (`fused_problem`, `fused_features`, `fused_skipped`, `fused_pairs`,
    `fused_settings`) and how it runs: in eval without gradients `fused_run_folded` on what `fused_fold` made; with
    batch statistics or gradients `fused_run_unfolded`; and in plain PyTorch. Users hang what they like on their
    modules, so all names here begin with `fused_`, but for `backend`.
    """

    backend: str | None = None
    fused_replaces: ClassVar[Replaced] = {}
    # What decides how it runs, of its own attributes.
    fused_reads: ClassVar[tuple[str, ...]] = ("forward", "backend", "_modules", "_is_full_backward_hook")
    fused_pays_in_nchw: ClassVar[bool] = False  # whether its unfolded form is faster on contiguous memory, too
    _fused_swapped_from: ClassVar[type[nn.Module] | None] = None
    _fused_owner: Owner

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._fused_owner = Owner()

    # What a subclass says.

    def fused_problem(self) -> str | None:
        """Why the fused form would not compute what the children do today; None where it does."""
        raise NotImplementedError

    def fused_features(self) -> tuple[str, ...]:
        """What this block has that others of its class have not: `fused_has` remembers it."""
        return ()

    def fused_skipped(self) -> list[nn.Module]:
        """The modules whose forward the fused form computes itself."""
        return list(self.modules())[1:]

    def fused_regarded(self) -> list[nn.Module]:
        """The modules on which it depends how this runs: those skipped, and what with `fused_features` would be."""
        return self.fused_skipped()

    def fused_pairs(self) -> list[Pair]:
        """The convolutions, with the BatchNorm behind each or None, that `fused_fold` makes its form of."""
        raise NotImplementedError

    def fused_settings(self) -> Any:
        """What the folded form depends on beside the pairs and the input."""
        return self.backend

    def fused_fold(self, x: Tensor) -> Any:
        """The weights, folded and packed for inputs such as x, which is empty; None where they cannot be."""
        raise NotImplementedError

    def fused_run_folded(self, x: Tensor, folded: Any) -> Tensor:
        """The result, on what `fused_fold` made."""
        raise NotImplementedError

    def fused_run_unfolded(self, x: Tensor) -> Tensor:
        """The result with batch statistics, or with gradients."""
        raise NotImplementedError

    def fused_run_traced(self, x: Tensor) -> Tensor:
        """The result in eval, for a graph that will be run with other weights, or on another machine."""
        raise NotImplementedError

    def fused_has(self, feature: str) -> bool:
        """Whether `fused_features` names it."""
        known = None if torch.compiler.is_compiling() else self._fused_owner.known
        return self._fused_has(feature) if known is None else feature in known.has

    def _fused_has(self, feature: str) -> bool:
        return feature in self.fused_features()

    _fused_has._dynamo_marked_constant = True  # type: ignore[attr-defined]

    # How a call runs.

    def fused_run(self, x: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """The result, in the form that fits this call; `plain` where none does."""
        if is_traced(x):
            return self._fused_run_in_trace(x, plain)
        kind = kind_of(x)
        if kind is None:
            return plain(x)
        owner, known = self._fused_owner, self._fused_owner.known
        # A problem may be a backward hook, which forms do not look at; and then nobody knows the tensors.
        if known is not None and known.problem is None and not wants_gradient(x, known.tensors):
            form = owner.find(self, kind)
            if form is not None and form.value is not None:
                return self._fused_run_form(x, form)
            if self._fused_waits(kind):
                return plain(x)
        known = self.fused_known()
        if known.problem is not None:
            return plain(x)
        if not known.folds or wants_gradient(x, known.tensors):
            self._fused_check_dtype(x, known.pairs)
            return self.fused_run_unfolded(x) if self._fused_pays(x, known.pairs) else plain(x)
        form = self._fused_form(kind, x, known)
        if form is None:
            return plain(x)
        if form.value is None:
            form.uses += 1
            return plain(x)
        return self._fused_run_form(x, form)

    def _fused_pays(self, x: Tensor, pairs: Sequence[Pair]) -> bool:
        """Whether x is worth a run with batch statistics or gradients; a backend that was asked for by name runs."""
        return not x.is_cpu or self.backend is not None or pays_on_cpu(x, pairs, in_nchw=self.fused_pays_in_nchw)

    def _fused_run_form(self, x: Tensor, form: Form) -> Tensor:
        if x.is_cuda:
            form.join()
        if detect_stale_weights.on:
            self.fused_check(form, x)
        form.uses += 1
        return self.fused_run_folded(x, form.value)

    def fused_check(self, form: Form, x: Tensor) -> None:
        """Raise StaleWeightsError if the form is not of today's weights."""
        form.check(self._fused_fold(x))

    def fused_ready(self, x: Tensor) -> Form | None:
        """The form on which this would run inputs such as x; None where it would run otherwise."""
        kind = kind_of(x)
        if kind is None:
            return None
        form = self._fused_owner.find(self, kind)
        if form is None or form.value is None:
            if self._fused_owner.waiting(kind) is not None:
                return None
            known = self.fused_known()
            if known.problem is not None or not known.folds or wants_gradient(x, known.tensors):
                return None
            form = self._fused_form(kind, x, known)
        return form if form is not None and form.value is not None else None

    def _fused_form(self, kind: Kind, x: Tensor, known: Understanding) -> Form | None:
        """Today's form for inputs such as x, made if it is time to; None where nothing can be kept."""
        pairs, sources = known.pairs, known.tensors
        self._fused_check_dtype(x, pairs)
        # Of inference tensors PyTorch does not count the changes; another layout may have been swapped in.
        if any(t.is_inference() or t.device != x.device or t.layout is not torch.strided for t in sources):
            return None
        if x.is_cuda and torch.cuda.is_current_stream_capturing():  # what is made in a capture is not there yet
            return None
        settings = (self.fused_settings(), [pair_settings(*pair) for pair in pairs])
        return self._fused_owner.obtain(
            kind, sources, settings, lambda: self._fused_fold(x), lambda: self._fused_snapshot(sources, gradients=False)
        )

    def _fused_fold(self, x: Tensor) -> Any:
        with torch.no_grad():
            return self.fused_fold(x[:0])

    def fused_refill_captured(self) -> None:
        """Make again, in its memory, what CUDA graphs read."""
        for form in self._fused_owner.forms:
            if form.captured and (known := self.fused_known()).problem is None:
                cast, dtype, device = form.kind
                with torch.autocast(device.type, cast, enabled=cast is not None):
                    x = torch.empty((0, known.pairs[0][0].in_channels, 1, 1), dtype=dtype, device=device)
                    self._fused_form(form.kind, x, known)

    def _fused_check_dtype(self, x: Tensor, pairs: Sequence[Pair]) -> None:
        for conv, _ in () if autocast_dtype(x) else pairs:
            if conv.weight.dtype != x.dtype:
                name = next(name for name, t in self.named_parameters() if t is conv.weight)
                raise TypeError(
                    f"{type(self).__name__}: the input is {x.dtype}, but {name} is {conv.weight.dtype}: "
                    "they must agree (convert the one or the other, or use torch.autocast)"
                )

    def _fused_snapshot(self, tensors: Sequence[Tensor] = (), *, gradients: bool = True) -> Snapshot:
        return Snapshot(self, self.fused_regarded(), self._fused_methods(), tensors, gradients=gradients)

    def _fused_methods(self) -> Iterator[Method]:
        """The methods that must stay what they are: those of the skipped modules' classes, and of the foreign ones."""
        yield ADDING
        modules = (self, *self.fused_regarded())
        for kind in {type(m) for m in modules[1:]}:
            yield from ((kind, name) for name in (*COMPUTING, *CALLS) if hasattr(kind, name))
        for kind in {type(m) for m in modules if isinstance(m, FusedModule)}:
            yield from ((kind._fused_swapped_from, name) for name in kind.fused_replaces if kind._fused_swapped_from)

    def fused_known(self) -> Understanding:
        """What this block is, looked at again where anything of it has changed."""
        owner = self._fused_owner
        known, other = owner.known, owner.other
        if known is not None and known.snapshot.holds(self):
            return known
        if other is not None and other.snapshot.holds(self):
            owner.known, owner.other = other, known
            return other
        return self.fused_understand()

    def _fused_waits(self, kind: Kind) -> bool:
        """Whether it is too early to look at the weights again."""
        waiting, known = self._fused_owner.waiting(kind), self._fused_owner.known
        if waiting is not None:  # other weights are other tensors in the first convolution too
            waiting.note(known.pairs[0][0]._parameters.get("weight") if known is not None and known.pairs else None)
        return waiting is not None

    def _fused_own(self) -> Owner:
        """The owner of this very block's forms: a copy of a block's dictionary still has the other's."""
        owner = self._fused_owner
        if owner.module is not None and owner.module() is not self:
            self._fused_owner = owner = Owner()
        owner.module = owner.module or weakref.ref(self)
        return owner

    def fused_understand(self) -> Understanding:
        """Look at what the children are today."""
        # A trace may replace every module's call; hooks on them are another matter.
        return self._fused_understand(replaced_for_all() if is_recording() else watched_by_all())

    def _fused_understand(self, watched: str | None) -> Understanding:
        owner, snapshot, problem = self._fused_own(), self._fused_snapshot(), watched or self._fused_problem()
        before = owner.known
        if problem is None:
            pairs = self.fused_pairs()
            folds = all(map(can_be_constant, pairs))
            known = Understanding(snapshot, None, self.fused_features(), pairs, folds, list(sources_of(pairs)))
        else:
            known = Understanding(snapshot, problem, (), [], False, [])
        is_same = before is not None and before.tensors and [*map(id, before.tensors)] == [*map(id, known.tensors)]
        owner.known, owner.other = known, before if is_same else None
        owner.tidy()
        return known

    def _fused_problem(self) -> str | None:
        return "backend is reference" if self.backend == "reference" else self.fused_structure_problem()

    def fused_structure_problem(self) -> str | None:
        """Why this block would not run fused on any backend."""
        base = self._fused_swapped_from
        for name, uses in self.fused_replaces.items():
            if base is not None and not is_own(base, name, uses):
                return f"{base.__name__}.{name} was replaced, or is not the one that is understood"
            if base is not None and name in vars(self) and getattr(type(self), name) is getattr(base, name):
                return f"has a {name} of its own"
        hidden = vars(self).keys() & self._modules.keys()
        if hidden:
            return f"has a {min(hidden)} of its own in the place of a child"
        if self._is_full_backward_hook is False:  # such a hook sees what the last op's derivative gives
            return "has had a hook by register_backward_hook, not register_full_backward_hook"
        return self.fused_problem()

    # In a trace: of torch.compile, torch.export, make_fx, or on tensors that stand for others.

    def _fused_run_in_trace(self, x: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        if x.dim() != 4 or transforms_active() or self._fused_is_plain_in_trace():
            return plain(x)
        for module in self.fused_skipped():
            _guard_on(module)
        pairs = self.fused_pairs()
        self._fused_check_dtype(x, pairs)
        folds = all(map(has_running_statistics, pairs))
        if is_recording():  # which holds what has a derivative alone
            return self.fused_run_traced(x) if folds else plain(x)
        if folds and not wants_gradient(x, list(sources_of(pairs))):
            return self.fused_run_traced(x)
        return self.fused_run_unfolded(x)

    def _fused_is_plain_in_trace(self) -> bool:
        """Asked once a trace, on the real module: the compiler need not follow."""
        return torch.onnx.is_in_onnx_export() or self._fused_understand(replaced_for_all()).problem is not None

    _fused_is_plain_in_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]

    # As a part of a model.

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._fused_owner.prune(self)  # where weights have moved, or changed their dtype
        return self

    def _replicate_for_data_parallel(self: Self) -> Self:
        replica = super()._replicate_for_data_parallel()
        replica._fused_owner = Owner()
        return replica

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_fused_owner", None)  # a copy folds again at its first call
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fused_owner = Owner()
        self._fused_owner.patience = 1  # many a copy is called once, and then folding does not pay

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: fused_cnn.unfuse_(model) first, and fuse_ it "
            "again behind it; or use torch.compile or torch.export"
        )

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"backend={self.backend!r}")))

    # What the blocks are made of.

    def fused_bn_act(self, y: Tensor, bn: nn.BatchNorm2d, *, relu: bool = True) -> Tensor:
        """relu(bn(y)) of a convolution's raw output y."""
        return bn_relu(y, BatchNormArgs.of(bn), relu=relu, backend=self.backend)

    def fused_conv_chain(self, pairs: Sequence[Pair], x: Tensor) -> Tensor:
        """conv_n(relu(bn_(n-1)(... conv_1(x)))), for training; what lies between is not saved for backward."""
        y = pairs[0][0](on_16_bytes(x))
        for (_, bn), (conv, _) in pairwise(pairs):
            assert bn is not None
            weight, bias = conv.weight.to(y.dtype), None if conv.bias is None else conv.bias.to(y.dtype)
            y = bn_relu_conv(y, BatchNormArgs.of(bn), weight, bias, **geometry(conv), backend=self.backend)
        return y


class FusedBlock(FusedModule):
    """A fused module that is called for itself: forward, in every form."""

    fused_is_leaf: ClassVar[bool] = True  # one node in a graph that torch.fx traces

    def fused_plain_forward(self, x: Tensor) -> Tensor:
        """The block in plain PyTorch: every child is called. A foreign block's is its own class's forward."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.fused_is_leaf and isinstance(x, torch.fx.Proxy):
            name = x.tracer.path_of_module(self)
            return x.tracer.create_proxy("call_module", name, (x,), {})
        return self.fused_run(x, self.fused_plain_forward)


def block_problem(block: nn.Module, forward: Callable[..., Any] = FusedBlock.forward) -> str | None:
    """Why a fused block, whose class's own forward is this, cannot be computed by the one that it is a part of."""
    kind = type(block)
    if kind.forward is not forward or not vars(block).keys().isdisjoint(("forward", "_call_impl")):
        return f"({kind.__name__}) has a forward of its own"
    return call_problem(kind) or ("has hooks" if any(hooks(block)) else None)


def _guard_on(module: nn.Module) -> None:
    """Look at what a skipped module is, so that the compiler compiles anew where it is another one later."""
    if isinstance(module, nn.Conv2d):
        assert module.padding_mode == "zeros"
