"""One fused model, many callers: threads, each on a stream of its own where there is a GPU, and CUDA graphs of its
forward pass."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import DEVICE
from torch import Tensor, nn

from fused_cnn import fuse_, models
from fused_cnn.bench.peers import graphed

THREADS = 4


def network(name: str, backend: str | None = None) -> nn.Module:
    model = models.build(name, backend="reference").eval().to(DEVICE, memory_format=torch.channels_last)
    fuse_(model, backend=backend)
    return model


def images(seed: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 64, 64, generator=generator).to(DEVICE).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_threads_share_a_model(name: str) -> None:
    """On a CPU from the first call on, which folds the weights. On a GPU that is one stream's, and others may start
    when it is done."""
    model = network(name)
    inputs = [images(seed, batch=1 + seed % 3) for seed in range(2 * THREADS)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    else:
        model.eval()  # forgets the folded weights
    start = threading.Barrier(THREADS, timeout=60)

    def run(thread: int) -> list[Tensor]:
        stream = torch.cuda.stream(torch.cuda.Stream()) if DEVICE == "cuda" else contextlib.nullcontext()
        start.wait()
        with torch.no_grad(), stream:
            found = [model(x) for _ in range(3) for x in inputs[thread::THREADS]]
            if DEVICE == "cuda":
                torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        for thread, found in enumerate(pool.map(run, range(THREADS))):
            for actual, true in zip(found, 3 * expected[thread::THREADS], strict=True):
                assert torch.equal(actual, true)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "backend", "dtype"),
    [(name, None, dtype) for name in ("resnet18", "googlenet") for dtype in (torch.float32, torch.bfloat16)]
    + [("resnet18", "triton", torch.bfloat16)],
)
@torch.no_grad()
def test_a_captured_forward_replays_with_other_images(name: str, backend: str | None, dtype: torch.dtype) -> None:
    model, x = network(name, backend).to(dtype), images(0).to(dtype)
    replay = graphed(lambda: model(x))
    for seed in range(1, 4):
        x.copy_(images(seed))
        torch.testing.assert_close(replay(), model(x))


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_captured_after_a_change_has_the_new_weights() -> None:
    """A graph reads the folded weights of its capture: after a change it is captured again."""
    model, x = network("resnet18"), images(0)
    before = model(x)
    graphed(lambda: model(x))
    model.layer2[0].conv1.weight.mul_(1.5)
    replay = graphed(lambda: model(x))
    torch.testing.assert_close(replay(), model(x))
    assert not torch.allclose(model(x), before, rtol=1e-3)
