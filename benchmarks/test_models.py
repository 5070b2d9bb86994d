"""GoogLeNet and ResNet-50 on photographs: eager channels_last, torch.compile with frozen weights, fused;
inference and a training step.

`pytest benchmarks/test_models.py --benchmark-only --benchmark-json=out/models.json`; torch.compile takes
minutes for each network.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE

from fused_cnn.cli._benches import Bench, model_benches

BATCHES = (1, 8) if DEVICE == "cpu" else (1, 64)
BENCHES = model_benches(("googlenet", "resnet50"), (torch.float32, torch.bfloat16), BATCHES, device=DEVICE, compiled=True)


@pytest.mark.parametrize("bench", BENCHES, ids=lambda b: b.name)
def test_model(bench: Bench, measure: Callable[[Bench], None]) -> None:
    measure(bench)
