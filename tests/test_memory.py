"""Results on the CPU are ordinary tensors, however large: their memory is PyTorch's, no larger than they are, and
nothing of it is locked while a process forks."""

import copy
import os
import pickle
import signal
import threading
import time

import pytest
import torch
from torch import Tensor

from fused_cnn.ops import FoldedConv, conv_bias_relu, pack_conv, pack_residual_block, residual_stage

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's results")


def large(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 32, 96, 96, generator=generator).contiguous(memory_format=torch.channels_last)  # 2.3 MB


@torch.no_grad()
def large_result(seed: int = 0) -> Tensor:
    x = large(seed)
    return conv_bias_relu(x, *pack_conv(torch.randn(32, 32, 1, 1), None, like=x))


@torch.no_grad()
def test_results_that_are_alive_keep_their_values() -> None:
    weight = torch.randn(32, 32, 1, 1) / 6
    packed = pack_conv(weight, None, like=large(0))
    block = pack_residual_block([FoldedConv(weight, None)], None, shortcut=True, like=large(0))
    kept: list[tuple[Tensor, Tensor, int]] = []
    views: list[tuple[Tensor, Tensor, int]] = []
    for i in range(12):
        x = large(i)
        made = residual_stage(x, block) if i % 2 else conv_bias_relu(x, *packed)
        expected = torch.relu(torch.nn.functional.conv2d(x, weight) + (x if i % 2 else 0))
        if i % 3 == 0:
            kept.append((made, expected, i))
        elif i % 3 == 1:
            views.append((made[1:, 3:7], expected[1:, 3:7], i))  # a view holds the memory, too
        if len(kept) > 4:
            del kept[0], views[0]
        for mine, truth, of in (*kept, *views):
            torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-4, msg=f"result {of} after call {i}")


@torch.no_grad()
def test_results_are_ordinary_tensors() -> None:
    out = large_result()
    assert out.is_contiguous(memory_format=torch.channels_last) and out.storage_offset() == 0
    for other in (
        copy.deepcopy(out),
        pickle.loads(pickle.dumps(out)),
        out.clone(),
        torch.from_numpy(out.numpy().copy()),
    ):
        assert torch.equal(other, out)
    before = out.clone()
    out.share_memory_()
    assert out.is_shared() and torch.equal(out, before)
    assert torch.equal(out.add_(1), before + 1)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(4, 64, 100, 100), (3, 5)])
def test_results_take_another_shape_and_other_memory(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    out = large_result()
    assert out.untyped_storage().nbytes() == out.numel() * out.element_size()
    with pytest.warns(UserWarning, match="An output with one or more elements was resized"):
        torch.neg(values, out=out)
    assert torch.equal(out, -values)
    out = large_result()
    before, few = out.clone(), values.numel() < out.numel()
    out.resize_(shape)
    assert out.shape == shape
    kept = before.as_strided((15,), (1,))  # in the order in memory
    assert torch.equal(out.as_strided((15,), (1,)), kept)
    out.untyped_storage().resize_(0 if few else 2 * out.untyped_storage().nbytes())
    assert out.untyped_storage().nbytes() == (0 if few else 2 * 4 * values.numel())
    assert torch.equal(large_result().set_(values), values)


def check_forward(weight: Tensor, packed: object, seed: int) -> bool:
    x = large(seed)
    expected = torch.relu(torch.nn.functional.conv2d(x, weight))
    return torch.allclose(conv_bias_relu(x, packed), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_threads_do_not_share_results() -> None:
    weight = torch.randn(32, 32, 1, 1) / 6
    packed, _ = pack_conv(weight, None, like=large(0))
    wrong: list[int] = []

    @torch.no_grad()
    def work(seed: int) -> None:
        wrong.extend(seed for _ in range(10) if not check_forward(weight, packed, seed))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


FORKS, SECONDS = 60, 60  # a child takes milliseconds; one that waits for a lock that nobody holds, for ever


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@torch.no_grad()
def test_a_child_forked_while_other_threads_run_forward_runs_its_own() -> None:
    weight = torch.randn(32, 32, 1, 1) / 6
    packed, _ = pack_conv(weight, None, like=large(0))
    x, stop = large(0), threading.Event()

    @torch.no_grad()
    def work() -> None:
        while not stop.is_set():
            conv_bias_relu(x, packed)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    try:
        for _ in range(FORKS):
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)  # as DataLoader's workers do: OpenMP's threads are not forked
                try:
                    os._exit(not check_forward(weight, packed, seed=1))
                finally:
                    os._exit(2)
            deadline = time.monotonic() + SECONDS
            while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
                time.sleep(0.001)
            if done == (0, 0):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                pytest.fail(f"a child had not finished after {SECONDS} s")
            assert os.waitstatus_to_exitcode(done[1]) == 0
    finally:
        stop.set()
        for t in threads:
            t.join()
