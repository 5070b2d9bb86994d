"""What both suites share: the device, the choice to leave torch.compile out, and one timing routine.

A benchmark checks its numbers, times all its variants in interleaved rounds as `fused-cnn bench` does, and
keeps that row in extra_info for `fused-cnn report`; pytest-benchmark's own columns show the fused variant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_cnn.cli import _ceilings
from fused_cnn.cli._benches import Bench
from fused_cnn.cli._ceilings import Ceilings
from fused_cnn.cli._common import dtype_of
from fused_cnn.cli.bench import BATCHES as DEFAULT_BATCHES
from fused_cnn.cli.bench import DTYPES as DEFAULT_DTYPES
from fused_cnn.cli.info import facts_of_run
from fused_cnn.measure import synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [dtype_of(name) for name in DEFAULT_DTYPES[DEVICE]]
BATCHES = DEFAULT_BATCHES[DEVICE]
torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as in `fused-cnn bench`


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    parser.addoption("--seconds", type=float, default=1.0, help="how long to time each row")


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    return _ceilings.measure(DEVICE, DTYPES)


@pytest.fixture(scope="session")
def facts(ceilings: Ceilings) -> dict[str, Any]:
    return {"backend": "auto", **facts_of_run(DEVICE), "ceilings": ceilings.to_dict()}


@pytest.fixture
def measure(benchmark: Any, facts: dict[str, Any], ceilings: Ceilings, request: pytest.FixtureRequest) -> Callable[[Bench], None]:
    def run(bench: Bench) -> None:
        bench.compilers = () if request.config.getoption("--no-compile") else ("compile",)
        work, interleaved = bench.prepare()
        row = bench.row(interleaved.run(request.config.getoption("--seconds")), work, ceilings)
        fused = work.variants["fused"]

        def synchronized() -> None:
            fused()
            synchronize(bench.device)

        benchmark.group = bench.labels.get("op") or bench.labels["model"]
        benchmark.extra_info.update(row=row, facts=facts, gb_per_s=row["gb_per_s"]["fused"], share_of_limit=row["share_of_limit"]["fused"])
        benchmark.pedantic(synchronized, rounds=5, iterations=interleaved.calls["fused"])

    return run
