"""Times variants of the same work against each other: interleaved rounds and medians, so that a machine's
drift hits all alike.

A round takes one sample of every variant, in an order that rotates. A sample is as many calls as fill
MIN_SAMPLE seconds. On a GPU it is timed by events on the device, with one synchronisation at the round's end;
one per call would add tens of microseconds to each.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SAMPLE = 1e-3
CACHE_BYTES = 256 << 20  # more than any device's last-level cache
HEAD_START = 1_000_000  # cycles, half a millisecond, in which the host queues work: its own time is not measured
Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median of the samples and the quartiles around it."""

    median: float
    low: float
    high: float
    samples: int


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def graphed(work: Work, device: torch.device | None = None) -> Work:
    """The work captured as a CUDA graph on a device, or the current one; its tensors stay where they are, so each
    replay does it again. A capture that fails leaves PyTorch's allocator and generator of random numbers in it: what
    runs later in that process fails, too.

    Warm-up and capture share a stream: autograd adds to a parameter's gradient on the stream where that parameter was
    first used, and outside of the capture's it may not. Graphs of earlier steps, which remember theirs, must therefore
    be gone: PyTorch does not collect them itself.
    """
    gc.collect()
    with torch.cuda.device(device):
        here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        here.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Autograd's threads may allocate meanwhile, which a capture in the global mode forbids.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                out = work()
        finally:
            torch.cuda.set_stream(here)  # which PyTorch leaves undone where the capture's end is an error

    def replay() -> object:
        graph.replay()
        return out

    return replay


def interleaved(
    variants: Mapping[str, Work], device: torch.device | str, seconds: float, at_least: int = 5, *, cold: bool = False
) -> dict[str, Timing]:
    """Time variants of one piece of work, in rounds for so long, and at least so many.

    Every variant runs a few times before, to warm it up and to find how many calls make a sample. `cold` takes samples
    of one call each, on a GPU with the caches overwritten first and the host ahead of the device.
    """
    device = torch.device(device)
    flush = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device) if cold and device.type == "cuda" else None
    calls = {}
    for name, work in variants.items():
        _sample(work, 2, device, flush)
        sample = _sample(work, 1, device, flush)
        synchronize(device)
        calls[name] = 1 if cold else max(1, round(MIN_SAMPLE / max(sample(), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names, end = list(variants), time.perf_counter() + seconds
    while len(samples[names[0]]) < at_least or time.perf_counter() < end:
        taken = {name: _sample(variants[name], calls[name], device, flush) for name in names}
        synchronize(device)
        for name, sample in taken.items():
            samples[name].append(sample())
        names = [*names[1:], names[0]]
    quartiles = {name: statistics.quantiles(of, n=4) for name, of in samples.items()}
    return {name: Timing(q[1], q[0], q[2], len(samples[name])) for name, q in quartiles.items()}


def _sample(work: Work, calls: int, device: torch.device, flush: Tensor | None) -> Callable[[], float]:
    """Run the work so often; what it returns gives the seconds per call once the device has been waited for."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            work()
        seconds = (time.perf_counter() - start) / calls
        return lambda: seconds
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if flush is not None:
            flush.zero_()
            if hasattr(torch.cuda, "_sleep"):  # a private name
                torch.cuda._sleep(HEAD_START)
        begin.record()
        for _ in range(calls):
            work()
        end.record()
    return lambda: begin.elapsed_time(end) * 1e-3 / calls
