"""Every op x real case x dtype, forward and backward: eager and fused, from the cases that the tests use.

`pytest benchmarks/test_ops.py --benchmark-only --benchmark-json=out/ops.json`, then `fused-cnn report
out/ops.json`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE

from fused_cnn.cli._benches import Bench, op_benches

DTYPES = (torch.float32, torch.bfloat16) if DEVICE == "cpu" else (torch.float16, torch.bfloat16)
BATCH = 1 if DEVICE == "cpu" else 32


@pytest.mark.parametrize("bench", op_benches(DTYPES, device=DEVICE, batch=BATCH, compiled=True), ids=lambda b: b.name)
def test_op(bench: Bench, measure: Callable[[Bench], None]) -> None:
    measure(bench)
