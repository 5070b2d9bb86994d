"""One network eager against fused: do the numbers agree, what does each take, launch and move, and what ran each op."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .. import _backends
from ..analysis import count, minimum_traffic, saved_bytes
from ..measure import Work, interleaved, synchronize
from .numbers import Pair, compare_scores, compare_training

GRADIENT_IMAGES = 2  # float64 convolutions are slow; batch statistics need two images where they are small
Say = Callable[[str], None]


@torch.no_grad()
def stage_times(pair: Pair, images: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Median seconds of each stage of the forward pass, eager and fused, in interleaved rounds. A child with several
    convolutions starts a stage, the last pooling the head; before comes the stem."""
    starts = {}
    for name, child in pair.eager.named_children():
        if sum(isinstance(m, nn.Conv2d) for m in child.modules()) > 1:
            starts[name] = name
        elif isinstance(child, nn.AdaptiveAvgPool2d):
            starts[name] = "head"
    marks: list[tuple[str, float]] = []

    def mark(stage: str) -> None:
        synchronize(images.device)
        marks.append((stage, time.perf_counter()))

    taken: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as hooks:
        for model in pair.models.values():
            for name, stage in starts.items():
                child = model.get_submodule(name)
                hooks.enter_context(child.register_forward_pre_hook(lambda *_, stage=stage: mark(stage)))
        for _ in range(rounds):
            for variant, model in pair.models.items():
                marks.clear()
                mark("stem")
                model(images)
                mark("end")
                for (stage, start), (_, end) in itertools.pairwise(marks):
                    taken.setdefault(stage, {}).setdefault(variant, []).append(end - start)
    return [{"stage": s, **{v: statistics.median(seconds) for v, seconds in of.items()}} for s, of in taken.items()]


def timed(works: dict[str, Work], device: torch.device, seconds: float) -> dict[str, Any]:
    timings = interleaved(works, device, seconds)
    ratio = timings["eager"].median / timings["fused"].median
    return {name: asdict(t) for name, t in timings.items()} | {"ratio": ratio}


def counted(pair: Pair, images: Tensor, backend: str | None) -> dict[str, Any]:
    """Traffic and launches of each variant, the least traffic, and which backend ran each op of the fused network."""
    traffic = {name: count(each).to_dict() for name, each in pair.works(images).items()}
    least = {"bytes": minimum_traffic(pair.eager, images, backward=pair.eager.training).bytes}
    ran = who_ran(traffic["fused"]["by_op"], backend, images.device.type)
    return {"traffic": traffic | {"minimum": least}, "backends": ran}


def who_ran(by_op: dict[str, Any], backend: str | None, device_type: str) -> list[dict[str, Any]]:
    """Which backend ran each op, and why."""
    rows = []
    for name, of_op in sorted(by_op.items(), key=lambda item: -item[1]["launches"]):
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
        rows.append({"op": name, "calls": of_op["calls"], "backend": ours or "PyTorch", "why": why})
    return rows


def verify_network(
    model: nn.Module, images: Tensor, *, backend: str | None, train: bool, seconds: float, say: Say
) -> dict[str, Any]:
    """Everything that the main job says about one network (eval mode, in images' dtype and device), as JSON."""
    pair = Pair.of(model, backend)
    entries = {k: [asdict(e) for e in getattr(pair.report, k)] for k in ("fused", "skipped")}
    say("comparing scores with float64")
    score, agreement = compare_scores(pair, images)
    say("comparing every gradient with float64")
    few = torch.cat([images, images.flip(3)])[:GRADIENT_IMAGES].contiguous(memory_format=torch.channels_last)
    gradients, exact = compare_training(pair, few)
    found: dict[str, Any] = {
        **entries,
        "ok": all(n.ok for n in (score, *gradients, *exact)),
        "scores": score.to_dict(),
        "training": [n.to_dict() for n in gradients],
        "training_float64": [n.to_dict() for n in exact],
        "top5": agreement,
    }
    say("timing eager and fused")
    found["time"] = {"eval": timed(pair.works(images), images.device, seconds)}
    found["stages"] = stage_times(pair, images, rounds=5)
    say("counting launches and bytes")
    found |= {key: {"eval": value} for key, value in counted(pair, images, backend).items()}
    if train:
        say("timing a training step")
        pair = pair.training()
        found["train"] = {
            "time": timed(pair.works(images), images.device, seconds),
            **counted(pair, images, backend),
            "saved_bytes": {n: saved_bytes(m, images) for n, m in pair.models.items()},
        }
    return found
