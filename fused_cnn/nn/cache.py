"""The owner of folded weights: what a block made of its children's weights, in the last few forms that were asked for.

A form holds as long as its snapshot does. What did not change is not made again; what keeps changing is not made at
all: the block then runs unfused, at PyTorch's own speed, until its weights rest. Forms are never saved, and a copy of a
block makes its own. Changes that PyTorch's version counters miss are covered where they can be known: an optimizer's
step makes the forms of its parameters stale. For the others there is `fused_cnn.refresh`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .._trees import tensors
from .snapshot import Snapshot

KEPT = 3  # forms of one block: autocast's, plain, and one more
PAYS = 16  # calls after which a form has paid for itself: packing takes as long as sixteen forward passes save
_lock = threading.RLock()
_forms: weakref.WeakSet[Form] = weakref.WeakSet()


def _after_fork() -> None:
    """A child has no thread that could release what another thread of its parent held."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


class StaleWeightsError(RuntimeError):
    """Folded weights are not what their sources are today: found by `detect_stale_weights`."""


# What folded weights depend on in an input: autocast's dtype or None, its own, and its device.
Kind = tuple[torch.dtype | None, torch.dtype, torch.device]


class Form:
    """A block's weights as its fused op wants them, for one kind of input. `value` is None until it is made."""

    def __init__(self, kind: Kind, key: Any, sources: Sequence[Tensor]) -> None:
        self.kind, self.device, self.key = kind, kind[2], key
        self.snapshot: Snapshot | None = None
        # They share the sources' memory, so that nothing new gets its address, and their version counters.
        self.aliases = [(t.detach(), t._version) for t in sources]
        self.ids = frozenset(map(id, sources))
        self.value: Any = None
        self.uses = 0
        self.stale = False  # told so, by an optimizer or by refresh
        self.captured = False  # a CUDA graph reads it, so its memory must stay where it is
        self.streams: set[int] = set()  # those that may read it
        self.made: torch.cuda.Event | None = None
        _forms.add(self)

    def is_alive(self) -> bool:
        """Whether its sources are what they were, though perhaps no longer the block's."""
        return not self.stale and all(t._version == version for t, version in self.aliases)

    def fill(self, value: Any, captured: Form | None) -> None:
        """Take what was folded and packed; into the memory of the form that a graph reads, where there is one."""
        if captured is not None:
            old, new = list(tensors(captured.value)), list(tensors(value))
            if [(t.shape, t.dtype) for t in old] == [(t.shape, t.dtype) for t in new]:
                here = torch.cuda.current_stream(self.device)
                for reading in captured.streams - {here.cuda_stream}:  # they may still read what it held
                    here.wait_stream(torch.cuda.ExternalStream(reading, self.device))
                for to, t in zip(old, new, strict=True):
                    to.copy_(t)
                value, self.captured = captured.value, True
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            self.streams, self.made = {stream.cuda_stream}, stream.record_event()
        self.value, self.uses = value, 0

    def join(self) -> None:
        """Let the current stream read: it waits for the one that made the weights, and keeps their memory."""
        stream, capturing = torch.cuda.current_stream(self.device), torch.cuda.is_current_stream_capturing()
        self.captured = self.captured or capturing
        if stream.cuda_stream in self.streams:
            return
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
        self.forms: tuple[Form, ...] = ()
        self.known: Any = None  # what the block is, as it understood itself (module.py)
        self.patience = 0  # calls on unchanged weights before a form is made
        self.pinned: list[Any] = []  # what graphs read of forms that are gone

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
        return form if form is not None and form.uses < self.patience else None

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
            key = settings, tuple((id(t), t._version, t.data_ptr()) for t in sources)
            form = next((f for f in self.forms if f.kind == kind and f.key == key and not f.stale), None)
            form = form or Form(kind, key, sources)
            captured = self._retire(form)
            is_due = form.uses >= self.patience or captured is not None
            if snapshot is not None and (form.value is not None or is_due):
                form.snapshot = snapshot()  # first: a change while the form is made is seen at the next call
            if form.value is None and is_due:
                form.fill(make(), captured)
            self._replace((form, *(f for f in self.forms if f is not form))[:KEPT])
            return form

    def _retire(self, new: Form) -> Form | None:
        """Drop the forms whose sources have changed, and learn from how long they were of use. Returns the one among
        them that a graph reads."""
        captured = None
        for form in self.forms:
            if form is new or form.is_alive():
                continue
            if form.captured and form.kind == new.kind:
                captured = form
            has_paid = form.value is not None and form.uses >= PAYS
            self.patience = 0 if has_paid else min(2 * self.patience + 1, PAYS)
            self._replace(tuple(f for f in self.forms if f is not form))
        return captured

    def _replace(self, forms: tuple[Form, ...]) -> None:
        self.pinned += [f.value for f in self.forms if f.captured and f not in forms]
        self.forms = forms

    def clear(self) -> None:
        """Forget all, but for what graphs read."""
        with _lock:
            self._replace(())
            self.known = None


def mark_stale(sources: Iterable[Tensor], *, and_all: bool = False) -> None:
    """Have the forms of these tensors, or all forms, made again."""
    with _lock:
        if _forms:
            ids = set(map(id, sources))
            for form in _forms:
                form.stale = form.stale or and_all or not ids.isdisjoint(form.ids)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Fused optimizers write parameters without PyTorch's version counters taking note. Where the parameters are of a
    kind of their own, such as shards, a block's are made of them in ways that nobody can tell."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    mark_stale(parameters, and_all=any(type(p) not in (Tensor, nn.Parameter) for p in parameters))


register_optimizer_step_post_hook(_after_step)


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
