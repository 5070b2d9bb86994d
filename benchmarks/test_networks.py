"""GoogLeNet and ResNet-50 on photographs, inference and a training step: eager channels_last, the peers at hand,
torch.compile, fused, in inference optimized.

`pytest benchmarks/test_networks.py --benchmark-only --benchmark-json=out/networks.json`, then `fused-cnn report
out/networks.json`.
"""

from collections.abc import Callable

import pytest
from conftest import CLOCK

from fused_cnn.bench.benches import Bench

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_network(bench: Bench, measure: Callable[[Bench], None]) -> None:
    measure(bench)
