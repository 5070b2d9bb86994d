"""Every op x real case x batch x dtype, forward and backward: eager and fused, from the cases that the tests use.

`pytest benchmarks/test_ops.py --benchmark-only --benchmark-json=out/ops.json`, then `fused-cnn report
out/ops.json`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import BATCHES, DEVICE, DTYPES

from fused_cnn.cli._benches import Bench, op_benches


@pytest.mark.parametrize("bench", op_benches(DTYPES, BATCHES, device=DEVICE), ids=lambda b: b.name)
def test_op(bench: Bench, measure: Callable[[Bench], None]) -> None:
    measure(bench)
