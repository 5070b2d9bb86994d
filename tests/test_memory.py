"""Large results on the CPU come from a pool: memory that a live tensor holds is never given out again."""

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor

from fused_cnn.ops import FoldedConv, conv_bias_relu, pack_conv, pack_residual_block, residual_stage

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's results")


def large(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 32, 96, 96, generator=generator).contiguous(memory_format=torch.channels_last)  # 2.3 MB


@torch.no_grad()
def test_results_that_are_alive_keep_their_values() -> None:
    weight = torch.randn(32, 32, 1, 1) / 6
    packed = pack_conv(weight, None, like=large(0))
    block = pack_residual_block([FoldedConv(weight, None)], None, shortcut=True, like=large(0))
    kept: list[tuple[Tensor, Tensor, int]] = []
    views: list[tuple[Tensor, Tensor, int]] = []
    for i in range(40):
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
    x = large(0)
    out = conv_bias_relu(x, *pack_conv(torch.randn(32, 32, 1, 1), None, like=x))
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


def test_threads_do_not_share_results() -> None:
    weight = torch.randn(32, 32, 1, 1) / 6
    packed = pack_conv(weight, None, like=large(0))
    wrong: list[int] = []

    @torch.no_grad()
    def work(seed: int) -> None:
        x = large(seed)
        expected = torch.relu(torch.nn.functional.conv2d(x, weight))
        for _ in range(10):
            if not torch.allclose(conv_bias_relu(x, *packed), expected, rtol=1e-4, atol=1e-4):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
