"""What one call does to the machine: which kernels it launches and for how long each keeps the device busy, where the
host's time goes, and the most memory that it needs beyond what is there.

Of memory PyTorch's allocator knows on a GPU. On a CPU each variant runs in a process of its own, whose largest resident
size Linux keeps (proc(5): VmHWM); there the first call's folded and packed weights count.
"""

import cProfile
import ctypes
import gc
import pstats
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..measure import Work, synchronize
from .worker import Worker

LONGEST_NAME = 110
Kernel = tuple[str, int, float]  # name, launches, microseconds
STEPS = 10  # that the host's profile is the mean of


def kernels(work: Work, device: str) -> list[Kernel]:
    """What one call runs, the longest first: kernels, copies and fills of a GPU; on a CPU ops, callees apart."""
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        work()
        synchronize(device)
    found = [
        (of.key[:LONGEST_NAME], of.count, of.self_device_time_total if on_gpu else of.self_cpu_time_total)
        for of in profiled.key_averages()
        if (of.device_type == DeviceType.CUDA) == on_gpu
    ]
    return sorted(found, key=lambda kernel: -kernel[2])


def host(work: Work, device: str, most: int = 25) -> list[list[Any]]:
    """The Python functions in which a call spends most of the host's own time: file:line(function), calls, seconds."""
    with cProfile.Profile() as profiler:
        for _ in range(STEPS):
            work()
    synchronize(device)
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    rows = [[_where(*at), calls / STEPS, own / STEPS] for at, (_, calls, own, *_) in stats.items()]
    return sorted(rows, key=lambda row: -row[2])[:most]


def _where(file: str, line: int, function: str) -> str:
    return function if file == "~" else f"{'/'.join(Path(file).parts[-3:])}:{line}({function})"


def peak_on_gpu(model: nn.Module, work: Work) -> int:
    """Of a model's work, which has run before: its folded weights are there; its gradients are dropped first."""
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peaks_in_children(makers: Mapping[str, Callable[[], Work]]) -> dict[str, int]:
    """For each variant, made and run once in a process of its own; empty where there is no /proc."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    with Worker() as worker:
        return {name: worker.call(name, _peak, make) for name, make in makers.items()}


def _peak(make: Callable[[], Work]) -> int:
    work = make()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0
