"""What both suites share: the device, the choice to leave torch.compile out, and one timing routine.

A benchmark checks its numbers, times all its variants in interleaved rounds as `fused-cnn bench` does, and
keeps that row in extra_info for `fused-cnn report`; pytest-benchmark's own columns show the fused variant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_cnn.cli._benches import Bench
from fused_cnn.cli.info import facts_of_run
from fused_cnn.measure import Interleaved, synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    parser.addoption("--seconds", type=float, default=1.0, help="how long to time each row")


@pytest.fixture(scope="session")
def facts() -> dict[str, Any]:
    return {"backend": "auto", **facts_of_run(DEVICE)}


@pytest.fixture
def measure(benchmark: Any, facts: dict[str, Any], request: pytest.FixtureRequest) -> Callable[[Bench], None]:
    def run(bench: Bench) -> None:
        bench.compiled = bench.compiled and not request.config.getoption("--no-compile")
        bench.check()
        variants, least_bytes = bench.make(bench.compiled)
        interleaved = Interleaved(variants, bench.device)
        row = bench.row(interleaved.run(request.config.getoption("--seconds")), least_bytes)
        fused = variants["fused"]

        def synchronized() -> None:
            fused()
            synchronize(bench.device)

        benchmark.group = bench.labels.get("op") or bench.labels["model"]
        benchmark.extra_info.update(row=row, facts=facts, bytes=least_bytes, gb_per_s=row["gb_per_s"]["fused"])
        benchmark.pedantic(synchronized, rounds=5, iterations=interleaved.calls["fused"])

    return run
