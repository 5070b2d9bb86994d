"""One network eager against fused: do the numbers agree, how long does each take, what does each launch and
move, and which backend ran each op.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .. import _backends
from ..analysis import count, minimum_traffic, saved_bytes
from ..measure import Interleaved, synchronize
from ._numbers import Pair, compare_scores, compare_training, training_step

GRADIENT_IMAGES = 2  # float64 convolutions are slow; batch statistics need two images where they are small
Say = Callable[[str], None]


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
    gradients, exact = compare_training(pair, few)
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
