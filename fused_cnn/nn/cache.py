"""The owner of folded weights: what a block made of its children's weights, in the last few forms that were asked for.

A form holds as long as its snapshot does. What did not change is not made again; what keeps changing is not made at
all: the block then runs unfused, at PyTorch's own speed, until its weights rest. Forms are never saved, and a copy of a
block makes its own. Changes that PyTorch's version counters miss are covered where they can be known: an optimizer's
step makes the forms stale that read its parameters' memory, and on a CPU the first eight bytes of each tensor are
looked at. For the others there is `fused_cnn.refresh`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .._trees import mapped, tensors
from .snapshot import Snapshot, states_of

KEPT = 3  # forms of one block: autocast's, plain, and one more
PAYS = 16  # calls after which a form has paid for itself: packing takes as long as sixteen forward passes save
_lock = threading.RLock()
_forms: weakref.WeakSet[Form] = weakref.WeakSet()


def _after_fork() -> None:
    """A child has no thread that could release what another thread of its parent held."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def _stream_by_its_object(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# Asked at every call: PyTorch's own number, where it has one, without the object around it.
_stream_of: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_by_its_object)


class StaleWeightsError(RuntimeError):
    """Folded weights are not what their sources are today: found by `detect_stale_weights`."""


# What folded weights depend on in an input: autocast's dtype or None, its own, and its device.
Kind = tuple[torch.dtype | None, torch.dtype, torch.device]


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _counter(t: Tensor) -> Tensor:
    """A tensor that shares t's version counter, and not its memory. A weak reference to t would tell as much, but
    PyTorch does not swap tensors that have one."""
    counter = t.detach()
    counter.data = counter.new_empty(0)
    return counter


class Form:
    """A block's weights as its fused op wants them, for one kind of input. `value` is None until it is made."""

    def __init__(self, kind: Kind, key: Any, sources: Sequence[Tensor]) -> None:
        self.kind, self.device, self.key = kind, kind[2], key
        self.snapshot: Snapshot | None = None
        self.first = id(sources[0])
        self.counters = [(_counter(t), t._version) for t in sources]
        self.owners = [StorageWeakRef(t.untyped_storage()) for t in sources]
        self.storages = frozenset(map(_storage, sources))
        self.memory: list[Tensor] = []  # the sources' while the form is the block's: nothing new gets its address
        self.value: Any = None
        self.uses = 0  # on its own sources
        self.misses = 0  # of a form that is not made: calls on others
        self.stale = False  # told so, by an optimizer or by refresh
        self.captured = False  # a CUDA graph or a plan reads it, so its memory must stay where it is
        self.streams: set[int] = set()  # those that may read it
        self.made: torch.cuda.Event | None = None
        _forms.add(self)

    def is_alive(self) -> bool:
        """Whether its sources are there, and what they were, though perhaps no longer the block's."""
        return (
            not self.stale
            and all(counter._version == version for counter, version in self.counters)
            and not any(owner.expired() for owner in self.owners)
        )

    def note(self, first: Tensor | None) -> None:
        """A call that ran without it, on weights of which this is the first."""
        if id(first) == self.first:
            self.uses += 1
        else:
            self.misses += 1

    def fill(self, value: Any, captured: Form | None) -> None:
        """Take what was folded and packed; into the memory of the form that a graph reads, where there is one."""
        if captured is not None:
            old, new = list(tensors(captured.value)), list(tensors(value))
            if [(t.shape, t.dtype) for t in old] == [(t.shape, t.dtype) for t in new]:
                for reading in tuple(captured.streams):  # they may still read what it held
                    here = torch.cuda.current_stream(self.device)
                    if reading != here.cuda_stream:
                        here.wait_stream(torch.cuda.ExternalStream(reading, self.device))
                for to, t in zip(old, new, strict=True):
                    to.copy_(t)
                held = iter(old)
                value, self.captured = mapped(lambda _: next(held), value, Tensor), True
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            self.streams, self.made = {stream.cuda_stream}, stream.record_event()
        self.value, self.uses = value, 0

    def join(self) -> None:
        """Let the current stream read: it waits for the one that made the weights, and keeps their memory."""
        capturing = torch.cuda.is_current_stream_capturing()
        self.captured = self.captured or capturing
        if _stream_of(self.device.index) in self.streams:
            return
        stream = torch.cuda.current_stream(self.device)
        if not capturing:  # who captures has waited for all that came before
            assert self.made is not None
            stream.wait_event(self.made)
        for t in tensors(self.value):
            t.record_stream(stream)
        self.streams.add(stream.cuda_stream)

    def check(self, today: Any) -> None:
        """Raise if what was folded again just now differs."""
        for held, made in zip(tensors(self.value), tensors(today), strict=True):
            if not torch.equal(held, made):
                raise StaleWeightsError(
                    "folded weights are not what their sources are now: a weight was changed in a way that PyTorch "
                    "does not see (through .data, a view of NumPy or DLPack, another process, a collective); "
                    "call fused_cnn.refresh(model) behind such a change"
                )


class Owner:
    """A block's forms. Reading is free of locks: `forms` is replaced as a whole."""

    def __init__(self) -> None:
        self.module: weakref.ref[nn.Module] | None = None  # whose it is, once that has looked at itself
        self.forms: tuple[Form, ...] = ()
        self.known: Any = None  # what the block is, as it understood itself (module.py)
        self.other: Any = None  # what it was before, of the same tensors: training and evaluation take turns
        self.patience = 0  # calls on unchanged weights before a form is made
        self.pinned: list[Any] = []  # what graphs read of forms that are gone

    def __reduce__(self) -> tuple[type[Owner], tuple[()]]:
        return Owner, ()  # whoever copies a block's dictionary as it is gets an owner of nothing

    def find(self, module: nn.Module, kind: Kind) -> Form | None:
        """The form for this kind of input, if all is as it was when it was made."""
        for form in self.forms:
            if form.kind == kind and not form.stale and form.snapshot is not None and form.snapshot.holds(module):
                return form
        return None

    def waiting(self, kind: Kind) -> Form | None:
        """The form for this kind of input that is not made yet, while it is too early to ask whether the weights rest:
        their counters only rise, so that to look now and then is as good as to look at every call."""
        form = next((f for f in self.forms if f.kind == kind and f.value is None), None)
        return form if form is not None and max(form.uses, form.misses) < self.patience else None

    def obtain(
        self,
        kind: Kind,
        sources: Sequence[Tensor],
        settings: Any,
        make: Callable[[], Any],
        snapshot: Callable[[], Snapshot] | None = None,
    ) -> Form:
        """Today's form for this kind of input; its value is None while the weights have not rested long enough."""
        with _lock:
            key = settings, states_of(sources)
            found = next((f for f in self.forms if f.kind == kind and f.key == key and f.is_alive()), None)
            captured = self._retire(kind, found)
            form = found or self._new(kind, key, sources)
            form.misses = 0
            if form.value is not None or form.uses >= self.patience or captured is not None:
                if snapshot is not None:
                    form.snapshot = snapshot()  # first: a change while the form is made is seen at the next call
                form.memory = [t.detach() for t in sources]
                if form.value is None:
                    form.fill(make(), captured)
            self._replace((form, *(f for f in self.forms if f is not form))[:KEPT])
            return form

    def _new(self, kind: Kind, key: Any, sources: Sequence[Tensor]) -> Form:
        last = next((f for f in self.forms if f.kind == kind), None)
        if last is not None:
            self._learn(last)
        return Form(kind, key, sources)

    def _learn(self, form: Form) -> None:
        """From how long a form that is no longer the block's was of use."""
        has_paid = form.value is not None and form.uses >= PAYS
        self.patience = 0 if has_paid else min(2 * self.patience + 1, PAYS)

    def pin(self) -> None:
        """Have the forms that there are stay where they are in memory, and be made again there: a plan reads them."""
        for form in self.forms:
            form.captured = True

    def tidy(self) -> None:
        """Let go of what the block was, and of forms of it; but for those that graphs read, which wait for what shall
        take their place."""
        with _lock:
            self._retire(None, None)

    def _retire(self, kind: Kind | None, found: Form | None) -> Form | None:
        """Drop the forms whose sources have changed or gone. Returns the one of this kind that a graph reads."""
        module, captured = None if self.module is None else self.module(), None
        for form in self.forms:
            if form is found:
                continue
            if form.snapshot is not None and module is not None and not form.snapshot.holds(module):
                form.snapshot, form.memory = None, []  # they would keep what the block was
            if not form.is_alive() and not (form.captured and kind is None):
                if form.captured and form.kind == kind:
                    captured = form
                self._drop(form)
        return captured

    def _drop(self, form: Form) -> None:
        self._learn(form)
        self._replace(tuple(f for f in self.forms if f is not form))

    def _replace(self, forms: tuple[Form, ...]) -> None:
        self.pinned += [f.value for f in self.forms if f.captured and f not in forms]
        self.forms = forms

    def prune(self, module: nn.Module) -> None:
        """Forget what is not as it was, but for what graphs read."""
        with _lock:
            for form in self.forms:
                if form.snapshot is None or not form.snapshot.holds(module):
                    self._drop(form)
            if self.known is not None and not self.known.snapshot.holds(module):
                self.known = self.other = None


def mark_stale(sources: Iterable[Tensor]) -> None:
    """Have the forms made again that read the memory of these tensors; or all forms, where tensors are of a kind of
    their own, such as shards or functorch's, of which a block's are made in ways that nobody can tell."""
    with _lock:
        if not _forms:
            return
        storages = _storages(list(sources))
        for form in _forms:
            form.stale = form.stale or storages is None or not storages.isdisjoint(form.storages)


def _storages(tensors: list[Tensor]) -> set[int] | None:
    """Where the tensors lie; None if one of them has no memory that is its own."""
    if not all(type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided for t in tensors):
        return None
    try:
        return set(map(_storage, tensors))
    except RuntimeError:
        return None


def _around_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Fused optimizers write parameters without PyTorch's version counters taking note; but in a compiled graph, which
    counts. Asked before a step too, since an optimizer's own hooks behind it come first."""
    if not torch.compiler.is_compiling():
        mark_stale(p for group in optimizer.param_groups for p in group["params"])


register_optimizer_step_pre_hook(_around_step)
register_optimizer_step_post_hook(_around_step)


class detect_stale_weights:
    """Every call of a fused block folds its weights again, compares, and raises StaleWeightsError where they differ
    from those that it holds: for finding a change that PyTorch does not see. Slow; for all threads.

    Args:
        mode: True turns it on, False off; as a context manager, until its end.
    """

    on = False

    def __init__(self, mode: bool = True) -> None:
        self.before, detect_stale_weights.on = detect_stale_weights.on, mode

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        detect_stale_weights.on = self.before
