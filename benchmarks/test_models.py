"""GoogLeNet and ResNet-50 on photographs, inference and a training step: eager channels_last, the peers at hand, fused.

`pytest benchmarks/test_models.py --benchmark-only --benchmark-json=out/models.json`; torch.compile takes
minutes for each network.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import BATCHES, DEVICE, DTYPES

from fused_cnn.cli._benches import Bench, model_benches

BENCHES = model_benches(("googlenet", "resnet50"), DTYPES, BATCHES, device=DEVICE)


@pytest.mark.parametrize("bench", BENCHES, ids=lambda b: b.name)
def test_model(bench: Bench, measure: Callable[[Bench], None]) -> None:
    measure(bench)
