"""Ops on layers of real networks, forward and backward: eager, oneDNN's or cuDNN's own call, fused; from the cases that
the tests use.

`pytest benchmarks/test_ops.py --benchmark-only --benchmark-json=out/ops.json`, then `fused-cnn report out/ops.json`.
"""

from collections.abc import Callable

import pytest
from conftest import CLOCK

from fused_cnn.bench.benches import Bench

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_op(bench: Bench, measure: Callable[[Bench], None]) -> None:
    measure(bench)
