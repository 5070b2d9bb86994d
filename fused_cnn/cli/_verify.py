"""One network eager against fused: do the numbers agree, how long does each take, what does each launch and
move, and what ran.

Numbers. The truth is plain PyTorch in float64. An error of the fused network is at most FACTOR times eager's
own error in the same dtype, plus rounding, plus for gradients the kink: an activation that is zero but for
rounding may fall on either side of ReLU, and one that does moves its gradients by its whole share, which is
far more than rounding. Eager's own worst gradient shows how much. Because that term is wide, the same
gradients are also compared in float64, where no activation is so close to zero and the bound is rounding
alone.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _backends
from ..analysis import count, minimum_traffic, saved_bytes
from ..fuse import fuse_
from ..measure import Interleaved, synchronize
from ..testing import max_error
from ._networks import without_dropout

OUT_FACTOR, GRAD_FACTOR = 2.0, 3.0
ROUNDING = 16  # units in the last place of the largest value: sums of thousands of terms, taken in another order
KINK = 0.1  # of the largest value: the least that one activation beyond the kink is allowed to move a gradient
LARGEST = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}  # no scores may be further from the truth than this
FLOAT64_LARGEST = 1e-9
GRADIENT_IMAGES = 2  # float64 convolutions are slow; batch statistics need two images where they are small
Say = Callable[[str], None]


@dataclass(frozen=True)
class Number:
    """One tensor: fused against eager, each against float64, and the bound that `error` must keep; relative
    to the largest value.
    """

    name: str
    difference: float
    error: float
    eager_error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False for NaN

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


@dataclass
class Pair:
    """The same network twice over copies of the same weights, and what fuse_ said."""

    eager: nn.Module
    fused: nn.Module
    report: Any

    @classmethod
    def of(cls, model: nn.Module, backend: str | None) -> Pair:
        fused = copy.deepcopy(model)
        report = fuse_(fused, backend=backend, strict=True)
        return cls(model, fused, report)

    def training(self) -> Pair:
        """Copies in training mode that two runs can be compared on."""
        return Pair(without_dropout(self.eager).train(), without_dropout(self.fused).train(), self.report)


def scores(out: Any) -> Tensor:
    """The class scores: torchvision's networks with auxiliary classifiers return a named tuple in training."""
    return out if isinstance(out, Tensor) else out[0]


def loss(out: Any, labels: Tensor) -> Tensor:
    """Cross-entropy, with 0.3 of each auxiliary classifier's (arXiv 1409.4842, section 5)."""
    auxiliary = [] if isinstance(out, Tensor) else [o for o in out[1:] if o is not None]
    wide = [o if o.dtype == torch.float64 else o.float() for o in (scores(out), *auxiliary)]
    weights = [1.0] + [0.3] * len(auxiliary)
    return torch.stack([w * F.cross_entropy(o, labels) for w, o in zip(weights, wide, strict=True)]).sum()


def training_step(model: nn.Module, images: Tensor) -> Any:
    """Forward, loss and backward; returns what the network returned."""
    model.zero_grad(set_to_none=True)
    out = model(images)
    loss(out, torch.arange(len(images), device=images.device) * 7).backward()
    return out


def step_results(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Scores, gradients and running statistics after one training step of a copy."""
    model = without_dropout(model).train()
    results = {"training scores": scores(training_step(model, images)).detach()}
    results |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return results | {n: b for n, b in model.named_buffers() if b.is_floating_point()}


def relative(a: Tensor, b: Tensor) -> float:
    return max_error(a, b.double()) / max(b.abs().max().item(), 1e-30)


def contiguous(model: nn.Module) -> nn.Module:
    """A copy that runs in the other memory layout, by other algorithms: a second sample of eager's own
    error.
    """
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def compare_scores(pair: Pair, images: Tensor) -> tuple[Number, dict[str, float]]:
    """Scores in eval mode, and how many of the five best classes fused shares with eager, and eager with
    float64.
    """
    dtype = images.dtype
    with torch.no_grad():
        truth = copy.deepcopy(pair.eager).double()(images.double())
        eager, fused = pair.eager(images), pair.fused(images)
        other = contiguous(pair.eager)(images.contiguous())
    eager_error = max(relative(eager, truth), relative(other, truth))
    bound = min(OUT_FACTOR * eager_error + ROUNDING * torch.finfo(dtype).eps, LARGEST[dtype])
    number = Number("scores", relative(fused, eager), relative(fused, truth), eager_error, bound)
    return number, {"fused_and_eager": top5(fused, eager), "eager_and_float64": top5(eager, truth)}


def top5(a: Tensor, b: Tensor) -> float:
    """The share of each image's five best classes that both have."""
    both = a.topk(5).indices.unsqueeze(2) == b.topk(5).indices.unsqueeze(1)
    return both.any(2).double().mean().item()


def compare_training(pair: Pair, images: Tensor) -> list[Number]:
    """Every gradient and running statistic of one training step, in the images' dtype."""
    truth = step_results(copy.deepcopy(pair.eager).double(), images.double())
    eager = step_results(pair.eager, images)
    other = step_results(contiguous(pair.eager), images.contiguous())
    fused = step_results(pair.fused, images)
    errors = {n: max(relative(eager[n], t), relative(other[n], t)) for n, t in truth.items()}
    rounding = ROUNDING * torch.finfo(images.dtype).eps
    gradients = {n for n, p in pair.eager.named_parameters()}
    kink = max([KINK, *(errors[n] for n in gradients & truth.keys())])
    return [
        Number(
            n,
            relative(fused[n], eager[n]),
            relative(fused[n], t),
            errors[n],
            GRAD_FACTOR * errors[n] + rounding + kink if n in gradients else OUT_FACTOR * errors[n] + rounding,
        )
        for n, t in truth.items()
    ]


def compare_training_in_float64(pair: Pair, images: Tensor) -> list[Number]:
    """The same step with both networks in float64, where they differ by rounding alone."""
    truth = step_results(copy.deepcopy(pair.eager).double(), images.double())
    fused = step_results(copy.deepcopy(pair.fused).double(), images.double())
    errors = {n: relative(fused[n], t) for n, t in truth.items()}
    return [Number(n, error, error, 0.0, FLOAT64_LARGEST) for n, error in errors.items()]


def stage_starts(model: nn.Module) -> dict[str, str]:
    """Child name -> stage: a child with several convolutions starts one; what comes before is the stem,
    pooling and after the head.
    """
    starts = {}
    for name, child in model.named_children():
        if sum(isinstance(m, nn.Conv2d) for m in child.modules()) > 1:
            starts[name] = name
        elif isinstance(child, nn.AdaptiveAvgPool2d):
            starts[name] = "head"
    return starts


def stage_times(pair: Pair, images: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Median seconds of each stage of the forward pass, eager and fused, in interleaved rounds."""
    starts = stage_starts(pair.eager)
    models = {"eager": pair.eager, "fused": pair.fused}
    samples: dict[str, dict[str, list[float]]] = {variant: {} for variant in models}
    for _ in range(rounds):
        for variant, model in models.items():
            for stage, seconds in _one_pass(model, images, starts).items():
                samples[variant].setdefault(stage, []).append(seconds)
    median = {v: {s: float(torch.tensor(t).median()) for s, t in by_stage.items()} for v, by_stage in samples.items()}
    return [{"stage": s, "eager": t, "fused": median["fused"][s]} for s, t in median["eager"].items()]


def _one_pass(model: nn.Module, images: Tensor, starts: dict[str, str]) -> dict[str, float]:
    marks: list[tuple[str, float]] = []

    def mark(stage: str) -> None:
        synchronize(images.device)
        marks.append((stage, time.perf_counter()))

    children = dict(model.named_children())
    handles = [children[n].register_forward_pre_hook(lambda *_, stage=s: mark(stage)) for n, s in starts.items()]
    try:
        mark("stem")
        model(images)
        mark("end")
    finally:
        for handle in handles:
            handle.remove()
    return {stage: after - start for (stage, start), (_, after) in itertools.pairwise(marks)}


def timed(variants: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, Any]:
    timings = Interleaved(variants, device).run(seconds)
    ratio = timings["eager"].median / timings["fused"].median
    return {name: t.to_dict() for name, t in timings.items()} | {"ratio": ratio}


def traffic(pair: Pair, images: Tensor) -> dict[str, Any]:
    counted = {name: count(m, images).to_dict() for name, m in (("eager", pair.eager), ("fused", pair.fused))}
    return counted | {"minimum": {"bytes": minimum_traffic(pair.eager, images).bytes}}


def who_ran(by_op: dict[str, Any], backend: str | None, device_type: str) -> list[dict[str, Any]]:
    """Which backend ran each op, and why."""
    rows = []
    for name, counted in sorted(by_op.items(), key=lambda item: -item[1]["launches"]):
        namespace = name.partition("::")[0]
        ours = {"fused_cnn": "native", "fused_cnn_triton": "triton"}.get(namespace)
        if ours is None:
            why = "not part of a fused op"
            if backend == "reference":
                why = "asked for with --backend reference"
            elif not (state := _backends.status("native", device_type)).on:
                why = f"native is off: {state.reason}"
        elif backend in (None, "auto"):
            why = f"auto takes {ours} where it has a kernel for {device_type}"
        else:
            why = f"asked for with --backend {backend}"
        rows.append({"op": name, "calls": counted["calls"], "backend": ours or "PyTorch", "why": why})
    return rows


def verify_network(model: nn.Module, images: Tensor, *, backend: str | None, train: bool, seconds: float, say: Say) -> dict[str, Any]:
    """Everything that the main job says about one network (eval mode, in images' dtype and device), as
    JSON.
    """
    device = images.device
    pair = Pair.of(model, backend)
    entries = {k: [asdict(e) for e in getattr(pair.report, k)] for k in ("fused", "skipped")}
    say("comparing scores with float64")
    score, agreement = compare_scores(pair, images)
    say("comparing every gradient with float64")
    few = torch.cat([images, images.flip(3)])[:GRADIENT_IMAGES].contiguous(memory_format=torch.channels_last)
    gradients = compare_training(pair, few)
    say("comparing every gradient in float64")
    exact = compare_training_in_float64(pair, few)
    numbers = [score, *gradients, *exact]
    found: dict[str, Any] = {
        **entries,
        "ok": all(n.ok for n in numbers),
        "scores": score.to_dict(),
        "training": [n.to_dict() for n in gradients],
        "training_float64": [n.to_dict() for n in exact],
        "top5": agreement,
    }
    with torch.no_grad():
        say("timing eager and fused")
        variants = {"eager": lambda: pair.eager(images), "fused": lambda: pair.fused(images)}
        found["time"] = {"eval": timed(variants, device, seconds)}
        found["stages"] = stage_times(pair, images, rounds=5)
        say("counting launches and bytes")
        found["traffic"] = {"eval": traffic(pair, images)}
    found["backends"] = {"eval": who_ran(found["traffic"]["eval"]["fused"]["by_op"], backend, device.type)}
    if train:
        say("timing a training step")
        found |= {"train": training_facts(pair.training(), images, backend, seconds)}
    return found


def training_facts(pair: Pair, images: Tensor, backend: str | None, seconds: float) -> dict[str, Any]:
    """Time, traffic, memory kept for backward and ops of a training step."""
    models = {"eager": pair.eager, "fused": pair.fused}
    variants: dict[str, Callable[[], object]] = {n: lambda m=m: training_step(m, images) for n, m in models.items()}  # type: ignore[misc]
    counted = {n: count(training_step, m, images).to_dict() for n, m in models.items()}
    return {
        "time": timed(variants, images.device, seconds),
        "traffic": counted | {"minimum": {"bytes": minimum_traffic(pair.eager, images, backward=True).bytes}},
        "saved_bytes": {n: saved_bytes(m, images) for n, m in models.items()},
        "backends": who_ran(counted["fused"]["by_op"], backend, images.device.type),
    }
