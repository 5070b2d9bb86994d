"""optimize: a network made ready for deployment."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._backends import outlook
from .._trees import mapped, tensors
from ..fuse import FusionReport, _check_module, fuse_, refresh
from ..nn import FusedModule
from .graph import GraphedPlan, graphs_on
from .plan import Plan
from .record import NotRecordable, record

if TYPE_CHECKING:
    from .table import Table

SHAPES = 8  # that plans are kept for, beside those of `batch_sizes`
# Of a plan's result against the network's own, relative to the largest: the last layer sums in another order.
AGREES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
Shapes = tuple[tuple[int, ...], ...]  # of a call's inputs
_lock = threading.RLock()  # plans are made one at a time


def _after_fork() -> None:
    """A child has no thread that could release what another thread of its parent held."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def optimize(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    clone_outputs: bool = True,
    batch_sizes: Sequence[int] = (),
    pad_batches: bool = False,
) -> OptimizedModel:
    """The network, frozen for inference: fused, BatchNorm folded, weights packed once, and run as one plan a shape.

    On a CPU the plan's steps run in C++ one after the other, their activations in one arena; on a GPU a CUDA graph is
    captured for each shape. Inputs of a new shape make a plan at their first call, up to 8 shapes beside those of
    `batch_sizes`; then a shape that is met again takes the place of the one that was not used for longest, and one that
    is met once runs fused without a plan, of which a warning tells once. What cannot be planned (a network that reads
    values on the host, say) runs fused without one; `print(optimized.table())` has a row for each step, and for what
    was not fused, and why. `model` stays as it was, and shares its parameters: `refresh()` takes in what has changed.

    Args:
        model: any module; it runs in eval mode, whatever mode it is in.
        example_inputs: its input, (N, C, H, W) or another shape, or several; on the device and in the dtype of later
            calls. Sizes may differ from it later, but not the channels, nor those of inputs that are no images.
        dtype: torch.bfloat16 or torch.float16 to compute in, as under torch.autocast, of weights that are folded in
            their own dtype; None for the model's.
        backend: "reference", "native", "triton", or None for the best at hand.
        clone_outputs: on a GPU False leaves results in the graph's memory, which the next call overwrites.
        batch_sizes: batches for which plans are made now.
        pad_batches: have a batch that has no plan run in the next larger of `batch_sizes`, where every result has a row
            an image; no image's may depend on the others.

    Returns:
        An OptimizedModel, to be called as the model is, from any thread and on any stream.

    Raises:
        TypeError, ValueError: not a module, inputs that are no tensors, or not on the parameters' device; a dtype, a
            backend or batch sizes that are none; `pad_batches` without sizes.
    """
    _check_module("optimize", model)
    example: list[Any] = list(example_inputs) if isinstance(example_inputs, (list, tuple)) else [example_inputs]
    if not example or not all(isinstance(x, Tensor) and x.dim() > 0 for x in example):
        raise TypeError(f"optimize: example_inputs must be a tensor or several, with a batch, got {example_inputs!r}")
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"optimize: dtype must be torch.bfloat16, torch.float16 or None (the model's), got {dtype}")
    if not all(isinstance(n, int) and n > 0 for n in batch_sizes) or (pad_batches and not batch_sizes):
        raise ValueError(
            f"optimize: batch_sizes must be whole numbers above 0, got {batch_sizes!r}; pad_batches needs some"
        )
    weight = next(chain(model.parameters(), model.buffers()), None)
    for x in example:
        if weight is not None and x.device != weight.device:
            raise ValueError(f"optimize: the model is on {weight.device}, but an example input is on {x.device}")
    return OptimizedModel(model, example, dtype, backend, clone_outputs, tuple(batch_sizes), pad_batches)


class OptimizedModel(nn.Module):
    """What `optimize` returns. It has no parameters of its own: `model` has them."""

    model: nn.Module
    report: FusionReport
    _fused: nn.Module

    def __init__(
        self,
        model: nn.Module,
        example: Sequence[Tensor],
        dtype: torch.dtype | None,
        backend: str | None,
        clone_outputs: bool,
        batch_sizes: tuple[int, ...],
        pad_batches: bool,
    ) -> None:
        super().__init__()
        vars(self)["model"] = model  # not a child, whose parameters would be this module's
        self.dtype, self.backend, self.clone_outputs = dtype, backend, clone_outputs
        self.batch_sizes, self.pad_batches = tuple(sorted(set(batch_sizes))), pad_batches
        self._like = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in example]
        self._device = example[0].device
        self._graphs = graphs_on(self._device)
        self._replays = threading.Lock()
        self._clock = itertools.count()
        self._start()
        super().train(False)
        first = [x.detach() for x in example]
        for n in reversed(self.batch_sizes):  # the largest first: the others' activations fit into its memory
            self._make_plan(self._random(n))
        self._example_shapes = _shapes(first)
        if not self._reason and self._example_shapes not in self._plans:
            self._make_plan(first)

    def _start(self) -> None:
        """Fuse a copy that shares the model's parameters and buffers, and forget all plans."""
        shared = {id(t): t for t in chain(self.model.parameters(), self.model.buffers())}
        fused = copy.deepcopy(self.model, shared).eval()
        self.report = fuse_(fused, backend=self.backend)
        self.report.runs = outlook(self.backend, self._device)
        for module in _fused_modules(fused):
            module._fused_owner.patience = 0  # a copy waits with folding until it is called again: this one will be
        vars(self)["_fused"] = fused
        self._plans: dict[Shapes, Plan | GraphedPlan] = {}
        self._used: dict[Shapes, int] = {}  # when each was last called
        self._seen: set[Shapes] = set()  # shapes that were met once while there was no place for them
        self._reason = ""  # why there are no plans
        self._told = False

    # Calls.

    def forward(self, *inputs: Tensor) -> Any:
        """The network's result, its images channels_last.

        Raises:
            TypeError, ValueError: inputs of another number, dtype, device or channels than the example's.
            RuntimeError: gradients are asked for.
        """
        self._check(inputs)
        found = None
        if inputs[0].size(0) > 0 and not (self._graphs and self._graphs.capturing()):  # it would be in that graph
            shapes = _shapes(inputs)
            found = self._find(inputs, shapes)
        if found is None:
            with self._context():
                return self._fused(*inputs)
        of, plan = found
        self._used[of] = next(self._clock)
        with torch.no_grad(), _without_autocast(self._device.type):  # which what was recorded has been through
            return self._run(plan, inputs, missing=of[0][0] - shapes[0][0])

    def _run(self, plan: Plan | GraphedPlan, inputs: Sequence[Tensor], *, missing: int) -> Any:
        """The result of a plan whose batch has so many images more."""
        if isinstance(plan, GraphedPlan):
            with self._replays:
                return plan.run(inputs, clone=self.clone_outputs)
        if missing:
            inputs = [torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) for x in inputs]
        out = plan.run([_in_channels_last(x) for x in inputs])
        return mapped(lambda t: t[:-missing], out, Tensor) if missing else out

    def _check(self, inputs: Sequence[Any]) -> None:
        if len(inputs) != len(self._like) or not all(isinstance(x, Tensor) for x in inputs):
            kinds = ", ".join(type(x).__name__ for x in inputs)
            raise TypeError(f"optimized model: {len(self._like)} tensors are wanted, as in the example, got ({kinds})")
        for i, (x, like) in enumerate(zip(inputs, self._like, strict=True)):
            free = (0, 2, 3) if like.dim() == 4 else (0,)
            fits = x.dim() == like.dim() and all(d in free or x.size(d) == n for d, n in enumerate(like.shape))
            if not fits or x.dtype != like.dtype or x.device != self._device:
                wanted = ["N", str(like.size(1)), "H", "W"] if like.dim() == 4 else ["N", *map(str, like.shape[1:])]
                raise (TypeError if fits and x.dtype != like.dtype else ValueError)(
                    f"optimized model: input {i} must be ({', '.join(wanted)}), {like.dtype}, on {self._device}, as "
                    f"the example was, got {tuple(x.shape)}, {x.dtype}, on {x.device}"
                )
            if x.size(0) != inputs[0].size(0):
                raise ValueError(f"optimized model: inputs have batches of {inputs[0].size(0)} and {x.size(0)}")
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            raise RuntimeError("optimized model: it computes no gradients; use torch.no_grad(), or the model itself")

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        """As the network runs by itself: no gradients, and the dtype that was asked for, whatever is on around it."""
        kind, dtype = self._device.type, self.dtype
        casts = torch.autocast(kind, dtype, cache_enabled=False) if dtype else _without_autocast(kind)
        with torch.no_grad(), casts:
            yield

    # Plans.

    def _find(self, inputs: Sequence[Tensor], shapes: Shapes) -> tuple[Shapes, Plan | GraphedPlan] | None:
        """The plan to run these inputs with, and its shapes; one that is made now, where there is a place for it."""
        plan = self._plans.get(shapes)
        if plan is not None:
            return shapes, plan
        for n in self.batch_sizes if self.pad_batches else ():
            larger = tuple((n, *shape[1:]) for shape in shapes)
            plan = self._plans.get(larger) if n > inputs[0].size(0) else None
            if plan is not None and plan.gives_rows:
                return larger, plan
        if self._reason:
            return None
        if len(self._unprepared()) >= SHAPES and shapes not in self._seen:
            self._seen = {*list(self._seen)[-SHAPES:], shapes}
            if not self._told:
                self._told = True
                warnings.warn(
                    f"optimized model: inputs of shape {shapes[0]} run without a plan, as {len(self._plans)} other "
                    "shapes have one; one that comes again takes the place of the one that was not used for longest",
                    RuntimeWarning,
                    stacklevel=4,
                )
            return None
        plan = self._make_plan(inputs)
        return None if plan is None else (shapes, plan)

    def _make_plan(self, inputs: Sequence[Tensor]) -> Plan | GraphedPlan | None:
        with _lock, torch.inference_mode(False), self._context():
            shapes = _shapes(inputs)
            if shapes in self._plans:  # another thread's
                return self._plans[shapes]
            try:
                made = self._made([_in_channels_last(x).clone() for x in inputs])
            except NotRecordable as reason:
                self._reason = str(reason)
                return None
            others = sorted(self._unprepared(), key=lambda key: self._used.get(key, -1))
            room = SHAPES - (shapes[0][0] not in self.batch_sizes)
            dropped = others[: max(0, len(others) - room)]
            for key in dropped:
                self._used.pop(key, None)
            self._used[shapes] = next(self._clock)
            self._plans = {key: plan for key, plan in self._plans.items() if key not in dropped} | {shapes: made}
            return made

    def _unprepared(self) -> list[Shapes]:
        """The shapes of plans that were made as they came."""
        return [shapes for shapes in self._plans if shapes[0][0] not in self.batch_sizes]

    def _made(self, inputs: Sequence[Tensor]) -> Plan | GraphedPlan:
        """A plan that gives what the network gives, also on other inputs than those that it was recorded on."""
        self._fused(*inputs)  # folds and packs
        plan = Plan(record(self._fused, inputs), inputs)
        for module in _fused_modules(self._fused):
            module._fused_owner.pin()
        others = [torch.rand_like(x) if x.is_floating_point() else x.flip(0) for x in inputs]
        for out, expected in zip(tensors(plan.run(others)), tensors(self._fused(*others)), strict=True):
            _check_agrees(out, expected)
        if self._graphs is None:
            return plan
        with self._replays:
            self._graphs.after_others()
            graphed = GraphedPlan(plan, inputs, self._graphs)
            self._graphs.is_used()
        return graphed

    def _random(self, batch: int) -> list[Tensor]:
        made = [torch.empty((batch, *like.shape[1:]), dtype=like.dtype, device=self._device) for like in self._like]
        return [x.normal_() if x.is_floating_point() else x.zero_() for x in made]

    def table(self) -> Table:
        """The plan for the example's shape, step by step, measured now: print it, or see its `rows`."""
        from .table import Table  # not above: importing this package is quick

        return Table.of(self)

    def refresh(self) -> OptimizedModel:
        """Take in changes of the model's weights, which in between may show in some layers and not in others: in place,
        so that plans and graphs stay what they are; where other tensors or modules are in the place of what was there,
        all is made anew. Nothing else may run this meanwhile.

        Returns itself.
        """
        with _lock, torch.inference_mode(False), self._context():
            plans = [p.plan if isinstance(p, GraphedPlan) else p for p in self._plans.values()]
            if not _same_tensors(self._fused, self.model) or not all(plan.still_valid() for plan in plans):
                self._start()
                return self
            refresh(self._fused)
            for plan in plans:
                plan.refill()
            if self._graphs is not None:
                self._graphs.is_used()
        return self

    # As a module: what has no meaning for something frozen says so.

    def train(self, mode: bool = True) -> OptimizedModel:
        if mode:
            raise RuntimeError("optimized model: it is for inference; train `.model`, then call refresh()")
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "optimized model: it stays on its device and in its dtype; convert `.model` and optimize that"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Its model and options are what is saved and copied; weights are packed again."""
        options = self.dtype, self.backend, self.clone_outputs, self.batch_sizes, self.pad_batches
        described = [(tuple(x.shape), x.stride(), x.dtype) for x in self._like]
        return _again, (self.model, described, self._device, options)


def _again(model: nn.Module, described: Any, device: torch.device, options: Any) -> OptimizedModel:
    weight = next(chain(model.parameters(), model.buffers()), None)  # where torch.load mapped it to
    device = device if weight is None else weight.device
    example = [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in described]
    for x in example:
        x.normal_() if x.is_floating_point() else x.zero_()
    return OptimizedModel(model, example, *options)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _fused_modules(network: nn.Module) -> Iterator[FusedModule]:
    return (module for module in network.modules() if isinstance(module, FusedModule))


def _shapes(inputs: Sequence[Tensor]) -> Shapes:
    return tuple(tuple(x.shape) for x in inputs)


def _in_channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _same_tensors(fused: nn.Module, model: nn.Module) -> bool:
    """Whether the model has the modules, parameters and buffers that it had when it was copied."""
    copies, originals = dict(fused.named_modules()), dict(model.named_modules())
    return copies.keys() == originals.keys() and all(
        of_copy.keys() == of_model.keys() and all(of_copy[key] is t for key, t in of_model.items())
        for name, module in originals.items()
        for of_copy, of_model in (
            (copies[name]._parameters, module._parameters),
            (copies[name]._buffers, module._buffers),
        )
    )


def _check_agrees(out: Tensor, expected: Tensor) -> None:
    if not expected.is_floating_point() or expected.numel() == 0:
        agrees = torch.equal(out, expected)
    else:
        scale = expected.abs().max().clamp_min(1e-30)
        agrees = bool(((out - expected).abs().max() / scale) <= AGREES[expected.dtype])
        agrees = agrees or not bool(expected.isfinite().all())
    if not agrees:
        raise NotRecordable("what was recorded gives other results on other inputs: it depends on more than them")
