"""One fused model, many callers: threads, each on a stream of its own where there is a GPU, and CUDA graphs of its
forward pass."""

import contextlib
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import DEVICE
from torch import Tensor, nn

from fused_cnn import _library, fuse_, models, refresh, unfuse_
from fused_cnn.measure import graphed
from fused_cnn.nn import BasicBlock, FusedModule, ResidualStage

THREADS = 4


def network(name: str, backend: str | None = None) -> nn.Module:
    model = models.build(name, backend="reference").eval().to(DEVICE, memory_format=torch.channels_last)
    fuse_(model, backend=backend)
    return model


def forget(model: nn.Module) -> None:
    """The weights will be folded again."""
    for module in model.modules():
        if isinstance(module, FusedModule):
            module._fused_owner.forms = ()


def images(seed: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 64, 64, generator=generator).to(DEVICE).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_threads_share_a_model(name: str) -> None:
    """From the first call on, which folds the weights."""
    model = network(name)
    inputs = [images(seed, batch=1 + seed % 3) for seed in range(2 * THREADS)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    forget(model)
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_in_a_graph_branches_beside_each_other_give_what_one_after_the_other_gives(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = _library.cuda.loaded
    if library is None:
        pytest.skip("not built")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # float32 is no problem of tensor cores otherwise
    model, x = network("googlenet").to(dtype), images(0).to(dtype)
    blocks = [p for p in _library.problems_of(library, lambda: model(x)) if p[-1] == _library.BLOCK]
    beside = (8, 0, 0, 0)
    assert blocks and all(beside in _library.tiles_of(library, block) for block in blocks)
    in_line = graphed(lambda: model(x))
    try:
        for block in blocks:
            _library.choose_tile(library, block, beside)
        replays = [graphed(lambda: model(x)) for _ in range(2)]
        for seed in range(1, 30):
            x.copy_(images(seed))
            expected = in_line().clone()
            assert all(torch.equal(replay(), expected) for replay in replays)
    finally:
        for block in blocks:
            _library.choose_tile(library, block, None)


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_sees_weights_that_were_folded_again() -> None:
    """A graph reads the folded weights of its capture, which are made again where they lie: at the next eager call
    behind a change, or by refresh."""
    model, x = network("resnet18"), images(0)
    before = model(x)
    replay = graphed(lambda: model(x))
    model.layer2[0].conv1.weight.mul_(1.5)
    changed = model(x)
    assert not torch.allclose(changed, before, rtol=1e-3)
    torch.testing.assert_close(replay(), changed)
    model.layer3[0].conv1.weight.data.mul_(0.5)  # which PyTorch does not see
    refresh(model)
    torch.testing.assert_close(replay(), model(x))
    again = graphed(lambda: model(x))
    model.eval().train().eval()
    torch.testing.assert_close(again(), replay())


@pytest.mark.gpu
@torch.no_grad()
def test_a_capture_without_a_call_before_it_folds_nothing() -> None:
    """What is made in a capture is not there until a replay: nothing of it may be kept."""
    model, x = network("resnet18"), images(0)
    expected = network("resnet18")
    expected.load_state_dict(model.state_dict())
    true = expected(x)
    unfuse_(expected)(x)  # cuDNN must have met the plain convolutions, which run in the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(x)
    torch.testing.assert_close(model(x), true)
    graph.replay()
    torch.testing.assert_close(out, true, rtol=1e-3, atol=1e-3)  # plain convolutions, whose sums have another order


@pytest.mark.gpu
@torch.no_grad()
def test_another_stream_waits_for_the_folding() -> None:
    model, x = network("resnet18"), images(0)
    expected = model(x)
    forget(model)
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        torch.cuda._sleep(200_000_000)  # a tenth of a second, behind which the weights are folded
        model(x)
    with torch.cuda.stream(second):
        out = model(x)
    torch.cuda.synchronize()
    torch.testing.assert_close(out, expected)


@pytest.mark.gpu
@torch.no_grad()
def test_a_stage_waits_for_its_blocks_weights() -> None:
    """Which another stream is still folding when the stage, made of them, runs for the first time."""
    stage = ResidualStage(BasicBlock(8, 8), BasicBlock(8, 8)).eval().to(DEVICE)
    x = torch.randn(2, 8, 16, 16, device=DEVICE)
    expected = unfuse_(copy.deepcopy(stage))(x)
    stage(x)  # sets up the libraries
    forget(stage)
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        torch.cuda._sleep(200_000_000)  # a tenth of a second, behind which the weights are folded
        for block in stage:
            block(x)
    with torch.cuda.stream(second):
        out = stage(x)
    torch.cuda.synchronize()
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)  # the library's sums in another order
