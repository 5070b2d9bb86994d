"""The most memory that a variant of a network needs beyond its weights and images, in bytes.

On a GPU PyTorch's allocator knows. On a CPU each variant runs in a process of its own, whose largest resident size
Linux keeps (proc(5): VmHWM); there the first call's folded and packed weights count.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from ..measure import Work
from .worker import Worker


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
