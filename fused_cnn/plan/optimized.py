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
from .._trees import mapped
from ..fuse import FusionReport, _check_module, fuse_, refresh
from ..nn import FusedModule
from .check import check_agree, random_like
from .graph import Device, GraphedPlan, graphs_on
from .plan import Plan
from .record import record

if TYPE_CHECKING:
    from .table import Table

SHAPES = 8  # that plans are kept for, beside those of `batch_sizes`
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
    sizes = batch_sizes if isinstance(batch_sizes, (list, tuple, range)) else (0,)
    if not all(isinstance(n, int) and n > 0 for n in sizes) or (pad_batches and not sizes):
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
        self._graphs: Device | None = None
        self._replays = threading.Lock()
        self._clock = itertools.count()
        self._example_shapes = _shapes(example)
        super().train(False)
        self._start([x.detach() for x in example])

    def _start(self, example: Sequence[Tensor]) -> None:
        """Fuse a copy that shares the model's parameters and buffers, and plan for the example and `batch_sizes`."""
        if self._graphs is not None:
            self._graphs.finish()  # what is given up may be in use
        self._graphs = graphs_on(self._device)
        held = [*self.model.parameters(), *self.model.buffers()]
        fused = copy.deepcopy(self.model, {id(t): t for t in held}).eval()
        self.report = fuse_(fused, backend=self.backend)
        self.report.runs = outlook(self.backend, self._device)
        for module in _fused_modules(fused):
            module._fused_owner.patience = 0  # a copy waits with folding until it is called again: this one will be
        vars(self)["_fused"] = fused
        self._of_model = _parts(self.model)
        self._plans: dict[Shapes, Plan | GraphedPlan] = {}
        self._prepared: set[Shapes] = set()  # what is planned here, and stays
        self._used: dict[Shapes, int] = {}  # when each was last called
        self._met: dict[Shapes, int] = {}  # shapes for which there was no place, and when they came first
        self._reason = ""  # why there are no plans
        self._told = False
        for n in reversed(self.batch_sizes):  # the largest first: the others' activations fit into its memory
            self._prepare([random_like(x, (n, *x.shape[1:])) for x in example])
        if self._example_shapes not in self._plans and not self._reason:
            self._make_plan(example)

    def _prepare(self, inputs: Sequence[Tensor]) -> None:
        self._prepared.add(_shapes(inputs))
        self._make_plan(inputs)

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
        out = plan.run([_laid_out(x) for x in inputs])
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
        with torch.inference_mode(False), torch.no_grad(), casts:
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
        if not self._has_place(shapes):
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

    def _has_place(self, shapes: Shapes) -> bool:
        """Whether a new shape gets a plan: there are few, or it came before, and since then one was not used."""
        others = self._unprepared()
        if len(others) < SHAPES:
            return True
        came_first = self._met.get(shapes)
        if came_first is None:
            self._met = dict([*self._met.items()][-SHAPES:]) | {shapes: next(self._clock)}
            return False
        return min(self._used.get(key, -1) for key in others) < came_first

    def _make_plan(self, inputs: Sequence[Tensor]) -> Plan | GraphedPlan | None:
        with _lock, torch.inference_mode(False), torch.no_grad():
            shapes = _shapes(inputs)
            if shapes in self._plans:  # another thread's
                return self._plans[shapes]
            given = [_laid_out(x).clone() for x in inputs]
            with self._context():
                self._fused(*given)  # folds and packs; what is wrong with the network or its input, it says here
            try:
                made = self._made(given)
            except Exception as reason:  # of PyTorch's operators some cannot be recorded, and some not be captured
                self._reason = str(reason) or type(reason).__name__
                return None
            others = sorted(self._unprepared(), key=lambda key: self._used.get(key, -1))
            dropped = others[: max(0, len(others) - SHAPES + (shapes not in self._prepared))]
            if dropped and self._graphs is not None:
                self._graphs.finish()
            self._used[shapes] = next(self._clock)
            self._plans = {key: plan for key, plan in self._plans.items() if key not in dropped} | {shapes: made}
            for key in (*dropped, shapes):
                self._met.pop(key, None)
            return made

    def _unprepared(self) -> list[Shapes]:
        """The shapes of plans that were made as they came."""
        return [shapes for shapes in self._plans if shapes not in self._prepared]

    def _made(self, inputs: Sequence[Tensor]) -> Plan | GraphedPlan:
        with self._context():
            tape = record(self._fused, inputs)
        for module in _fused_modules(self._fused):
            module._fused_owner.pin()
        batch = inputs[0].size(0)
        others = [_laid_out(random_like(x, x.shape, seed=1)) for x in inputs]
        with _without_autocast(self._device.type):
            plan = Plan(tape, inputs)
            out = plan.run(others)
        with self._context():
            check_agree(out, self._fused(*others))
            if self.pad_batches and plan.gives_rows and batch > 1:
                check_agree(out, self._fused(*(x[:-1] for x in others)), batch - 1)
        if self._graphs is None:
            return plan
        with self._replays, _without_autocast(self._device.type):
            self._graphs.after_others()
            graphed = GraphedPlan(plan, inputs, self._graphs)
            self._graphs.is_used()
        return graphed

    def table(self) -> Table:
        """The plan for the example's shape, step by step, measured now: print it, or see its `rows`."""
        from .table import Table  # not above: importing this package is quick

        return Table.of(self)

    def refresh(self) -> OptimizedModel:
        """Take in changes of the model's weights, which in between may show in some layers and not in others: in place,
        so that plans and graphs stay what they are. Where another tensor or module is in the place of what was there,
        or a tensor's memory elsewhere, all is made anew; a module's other attributes, such as a replaced method, need a
        new `optimize`. No other thread may call this network meanwhile.

        Returns itself.
        """
        with _lock, torch.inference_mode(False), torch.no_grad():
            if _parts(self.model) != self._of_model:
                self._start(
                    [random_like(torch.empty(0, dtype=x.dtype, device=self._device), x.shape) for x in self._like]
                )
                return self
            if self._graphs is not None:
                self._graphs.after_others()
            with self._context():
                refresh(self._fused)
            with _without_autocast(self._device.type):
                for plan in self._plans.values():
                    (plan.plan if isinstance(plan, GraphedPlan) else plan).refill()
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
    likes = [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in described]
    return OptimizedModel(model, [random_like(x, x.shape) for x in likes], *options)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _fused_modules(network: nn.Module) -> Iterator[FusedModule]:
    return (module for module in network.modules() if isinstance(module, FusedModule))


def _shapes(inputs: Sequence[Tensor]) -> Shapes:
    return tuple(tuple(x.shape) for x in inputs)


def _laid_out(x: Tensor) -> Tensor:
    """As plans take their inputs: images channels_last, what is none contiguous."""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def _parts(model: nn.Module) -> list[Any]:
    """A model's modules, parameters and buffers by name, and where the tensors lie. The modules themselves, so that no
    other one gets the place of one that is gone; the tensors stay, for the fused copy has them."""
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return [
        *model.named_modules(remove_duplicate=False),
        *((name, id(t), t.data_ptr(), t.shape) for name, t in tensors),
    ]
