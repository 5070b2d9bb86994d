"""Which kernels a piece of work launches, for how long each keeps the device busy, and where the host's time goes."""

from __future__ import annotations

import cProfile
import pstats
import sys
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..measure import Work, synchronize

LONGEST_NAME = 110
Kernel = tuple[str, int, float]  # name, launches, microseconds
STEPS = 10  # that the host's profile is the mean of


def kernels(work: Work, device: str) -> list[Kernel]:
    """What one call runs, the longest first: kernels, copies and fills of a GPU; on a CPU ops, callees apart."""
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        work()
        synchronize(device)
    found: dict[str, tuple[int, float]] = {}
    for event in profiled.events():
        if (event.device_type == DeviceType.CUDA) == on_gpu:
            name = event.name[:LONGEST_NAME]
            launches, microseconds = found.get(name, (0, 0.0))
            found[name] = launches + 1, microseconds + (event.device_time if on_gpu else event.self_cpu_time_total)
    return sorted(((name, *of) for name, of in found.items()), key=lambda kernel: -kernel[2])


def launches(work: Work, device: str) -> int:
    return sum(launches for _, launches, _ in kernels(work, device))


def host(work: Work, device: str, most: int = 25) -> list[list[Any]]:
    """The Python functions in which a call spends most of the host's own time: file:line(function), calls, seconds."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(STEPS):
        work()
    profiler.disable()
    synchronize(device)
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    rows = [[_where(*at), calls / STEPS, own / STEPS] for at, (_, calls, own, *_) in stats.items()]
    return sorted(rows, key=lambda row: -row[2])[:most]


def _where(file: str, line: int, function: str) -> str:
    if file == "~":
        return function
    roots = [root for root in sys.path if root and file.startswith(root.rstrip("/") + "/")]
    return f"{file[len(max(roots, key=len, default='')) :].lstrip('/') if roots else file}:{line}({function})"
