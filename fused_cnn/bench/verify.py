"""One network eager against fused, and optimized: do the numbers agree, what does each take, launch and move, and what
ran each op."""

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
from ..measure import interleaved, synchronize
from ..plan.optimized import optimize
from .numbers import Pair, compare_scores, compare_training, work

GRADIENT_IMAGES = 2  # float64 convolutions are slow; batch statistics need two images where they are small


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


def measured(pair: Pair, images: Tensor, backend: str | None, seconds: float, **others: nn.Module) -> dict[str, Any]:
    """What a pass of each variant takes, launches and moves, the least traffic, and which backend ran each op of the
    fused network. Of the others nothing is counted on a GPU: their graphs' kernels do not pass PyTorch's dispatcher."""
    works = pair.works(images) | {name: work(model, images) for name, model in others.items()}
    timings = interleaved(works, images.device, seconds)
    ratio = timings["eager"].median / timings["fused"].median
    counted = works if images.is_cpu else pair.works(images)
    traffic = {name: count(each).to_dict() for name, each in counted.items()}
    ran = who_ran(traffic["fused"]["by_op"], backend, images.device.type)
    traffic["minimum"] = {"bytes": minimum_traffic(pair.eager, images, backward=pair.eager.training).bytes}
    time = {name: asdict(timing) for name, timing in timings.items()}
    return {"time": {**time, "ratio": ratio}, "traffic": traffic, "backends": ran}


def who_ran(by_op: dict[str, Any], backend: str | None, device_type: str) -> list[dict[str, Any]]:
    """Which backend ran each op, and why."""
    asked, native = f"asked for with --backend {backend}", _backends.status("native", device_type)
    not_ours = "not part of a fused op" if native.on else f"native is off: {native.reason}"
    rows = []
    for name, of_op in sorted(by_op.items(), key=lambda item: -item[1]["launches"]):
        ours = {"fused_cnn": "native", "fused_cnn_triton": "triton"}.get(name.partition("::")[0])
        if ours is None:
            why = asked if backend == "reference" else not_ours
        else:
            why = asked if backend else f"auto takes {ours} where it has a kernel for {device_type}"
        rows.append({"op": name, "calls": of_op["calls"], "backend": ours or "PyTorch", "why": why})
    return rows


def verify_network(
    model: nn.Module, images: Tensor, *, backend: str | None, train: bool, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Everything that the main job says about one network (eval mode, in images' dtype and device), as JSON."""
    pair = Pair.of(model, backend)
    optimized = optimize(model, images, backend=backend)
    say("comparing scores with float64")
    scores, agreement = compare_scores(pair, images, optimized=optimized)
    say("comparing every gradient with float64")
    few = torch.cat([images, images.flip(3)])[:GRADIENT_IMAGES].contiguous(memory_format=torch.channels_last)
    gradients, exact = compare_training(pair, few)
    say("timing eager, fused and optimized, counting launches and bytes")
    inference = measured(pair, images, backend, seconds, optimized=optimized)
    found: dict[str, Any] = {
        **{k: [asdict(e) for e in getattr(pair.report, k)] for k in ("fused", "skipped")},
        "ok": all(n.ok for n in (*scores, *gradients, *exact)),
        "scores": scores[0].to_dict(),
        "scores_optimized": scores[1].to_dict(),
        "training": [n.to_dict() for n in gradients],
        "training_float64": [n.to_dict() for n in exact],
        "top5": agreement,
        **{key: {"eval": value} for key, value in inference.items()},
        "stages": stage_times(pair, images, rounds=5),
    }
    if train:
        say("timing a training step")
        pair = pair.training()
        saved = {n: saved_bytes(m, images) for n, m in pair.models.items()}
        found["train"] = {**measured(pair, images, backend, seconds), "saved_bytes": saved}
    return found
