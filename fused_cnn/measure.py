"""Times variants of the same work against each other: interleaved rounds and medians, so that a machine's
drift hits all alike.

A round takes one sample of every variant, in an order that rotates. A sample is as many calls as fill
MIN_SAMPLE seconds. On a GPU it is timed by events on the device, with one synchronisation at the round's end;
one per call would add tens of microseconds to each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

MIN_SAMPLE = 1e-3
CACHE_BYTES = 256 << 20  # more than any device's last-level cache
HEAD_START = (
    1_000_000  # cycles, half a millisecond: the host queues the work meanwhile, so that its own time is not measured
)
Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median of the samples and the quartiles around it."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        return cls(statistics.median(seconds), quartiles[0], quartiles[2], len(seconds))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Interleaved:
    """Variants of one piece of work, timed round by round."""

    def __init__(self, variants: Mapping[str, Work], device: torch.device | str = "cpu", *, cold: bool = False) -> None:
        """Runs every variant a few times, to warm it up and to find how many calls make a sample. `cold` takes samples
        of one call each, on a GPU with the caches overwritten first and the host ahead of the device."""
        self.variants, self.device = dict(variants), torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.flush = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device) if cold and on_gpu else None
        self.seconds: dict[str, list[float]] = {name: [] for name in self.variants}
        self.calls = {name: self._calls(work) for name, work in self.variants.items()}
        if cold:
            self.calls = dict.fromkeys(self.calls, 1)
        self.turn = 0

    def _calls(self, work: Work) -> int:
        self._sample(work, 2)
        sample = self._sample(work, 1)
        synchronize(self.device)
        return max(1, round(MIN_SAMPLE / max(sample(), 1e-9)))

    def _sample(self, work: Work, calls: int) -> Callable[[], float]:
        """Run the work so often; what it returns gives the seconds per call once the device has been waited for."""
        if self.device.type == "cuda":
            return self._sample_events(work, calls)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        seconds = (time.perf_counter() - start) / calls
        return lambda: seconds

    def _sample_events(self, work: Work, calls: int) -> Callable[[], float]:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if self.flush is not None:
                self.flush.zero_()
                if hasattr(torch.cuda, "_sleep"):  # a private name
                    torch.cuda._sleep(HEAD_START)
            start.record()
            for _ in range(calls):
                work()
            end.record()
        return lambda: start.elapsed_time(end) * 1e-3 / calls

    def round(self) -> None:
        """Take one sample of every variant."""
        names = list(self.variants)
        order = [names[(i + self.turn) % len(names)] for i in range(len(names))]
        samples = {name: self._sample(self.variants[name], self.calls[name]) for name in order}
        synchronize(self.device)
        for name, sample in samples.items():
            self.seconds[name].append(sample())
        self.turn += 1

    def run(self, seconds: float, at_least: int = 5) -> dict[str, Timing]:
        """Take rounds for so long, and at least so many; return every variant's timing."""
        end = time.perf_counter() + seconds
        done = 0
        while done < at_least or time.perf_counter() < end:
            self.round()
            done += 1
        return self.timings()

    def timings(self) -> dict[str, Timing]:
        return {name: Timing.of(samples) for name, samples in self.seconds.items()}
