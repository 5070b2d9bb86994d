"""A plan as a CUDA graph: its calls captured once on memory of the graph's own, and replayed by one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._trees import mapped
from .plan import Plan

WARM_UPS = 2  # runs before a capture: libraries make their handles and workspaces in the first one


class Device:
    """What a graph asks of its device. Captures share a pool of memory, so that one graph's activations lie where
    another's do, and no two may run at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.done: torch.cuda.Event | None = None  # what the last replay was followed by

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def after_others(self) -> None:
        """Have what comes now on the current stream wait for the last replay, on whatever stream that was."""
        if self.done is not None:
            torch.cuda.current_stream(self.device).wait_event(self.done)

    def is_used(self) -> None:
        """Have the next user wait for what is on the current stream now."""
        self.done = torch.cuda.current_stream(self.device).record_event()

    def finish(self) -> None:
        """Wait for the last replay: memory that it uses is about to be given back."""
        if self.done is not None:
            self.done.synchronize()

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any, int]:
        """Capture `work`: what replays it, its result, which each replay writes again, and the bytes of the pool. Other
        threads may go on using the device meanwhile."""
        here = torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device):
            self.side.wait_stream(here)
            try:
                with torch.cuda.stream(self.side):
                    for _ in range(WARM_UPS):
                        work()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local"):
                    out = work()
            finally:
                here.wait_stream(self.side)
            return graph.replay, out, self._pool_bytes()

    def _pool_bytes(self) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s.get("segment_pool_id", ())) == tuple(self.pool))


def graphs_on(device: torch.device) -> Device | None:
    """What captures plans for a device; None where they run as they are."""
    return Device(device) if device.type == "cuda" else None


class GraphedPlan:
    """A plan whose calls a graph has. Not safe for two threads at once: the model that it is of sees to that."""

    def __init__(self, plan: Plan, inputs: Sequence[Tensor], device: Device) -> None:
        self.plan, self.device = plan, device
        self.inputs = [x.clone() for x in inputs]
        self.replay, self.result, plan.bytes = device.capture(lambda: plan.run(self.inputs))
        self.gives_rows = plan.gives_rows

    def run(self, inputs: Sequence[Tensor], *, clone: bool) -> Any:
        """The result on these inputs, whose batch may be smaller than the plan's: the rest is what was there before. A
        clone, or the graph's own memory, which the next call of any shape overwrites."""
        self.device.after_others()
        for to, x in zip(self.inputs, inputs, strict=True):
            to[: x.size(0)].copy_(x, non_blocking=True)
        self.replay()
        rows, out = inputs[0].size(0), self.result
        if rows < self.inputs[0].size(0):
            out = mapped(lambda t: t[:rows], out, Tensor)
        out = mapped(Tensor.clone, out, Tensor) if clone else out
        self.device.is_used()
        return out
