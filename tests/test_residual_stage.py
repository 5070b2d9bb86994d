"""The residual block that runs as one op, against its convolutions in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_cnn
from fused_cnn import _library
from fused_cnn.ops import FoldedConv, pack_residual_block, residual_stage

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's form of the block"),
    pytest.mark.usefixtures("two_threads", "nan_filled_memory"),
]

# name: x's shape, the convolutions (out, kernel, stride, padding, dilation), the shortcut ("x", None, or (out, kernel, stride))
BLOCKS = {
    "bottleneck": ((3, 64, 14, 14), [(16, 1, 1, 0, 1), (16, 3, 1, 1, 1), (64, 1, 1, 0, 1)], "x"),
    "bottleneck, projected": ((2, 32, 15, 13), [(24, 1, 1, 0, 1), (24, 3, 2, 1, 1), (96, 1, 1, 0, 1)], (96, 1, 2)),
    "basic": ((5, 48, 7, 7), [(48, 3, 1, 1, 1), (48, 3, 1, 1, 1)], "x"),
    "basic, projected": ((2, 17, 9, 9), [(33, 3, 2, 1, 1), (33, 3, 1, 1, 1)], (33, 1, 2)),
    "plain": ((2, 16, 8, 8), [(20, 3, 1, 1, 1), (20, 3, 1, 1, 1)], None),
    "dilated": ((1, 8, 12, 12), [(8, 3, 1, 2, 2), (8, 3, 1, 2, 2)], "x"),
    "one convolution": ((2, 5, 6, 6), [(5, 3, 1, 1, 1)], "x"),
    "one pixel": ((1, 65, 1, 1), [(3, 1, 1, 0, 1), (65, 1, 1, 0, 1)], "x"),
    "empty batch": ((0, 16, 7, 7), [(16, 3, 1, 1, 1)], "x"),
}


def folded(shape: tuple[int, ...], convolutions: list, shortcut: object) -> tuple[list[FoldedConv], FoldedConv | None]:
    generator = torch.Generator().manual_seed(0)

    def make(channels: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> FoldedConv:
        weight = torch.randn(out, channels, kernel, kernel, generator=generator) / (channels * kernel * kernel) ** 0.5
        return FoldedConv(weight, torch.randn(out, generator=generator), stride, padding, dilation)

    chain, channels = [], shape[1]
    for conv in convolutions:
        chain.append(make(channels, *conv))
        channels = conv[0]
    return chain, make(shape[1], *shortcut, 0, 1) if isinstance(shortcut, tuple) else None


def in_turn(x: Tensor, chain: list[FoldedConv], projection: FoldedConv | None, adds: bool, dtype: torch.dtype) -> Tensor:
    """The block as eager PyTorch runs it."""

    def run(y: Tensor, conv: FoldedConv) -> Tensor:
        return F.conv2d(y, conv.weight.to(dtype), conv.bias.to(dtype), conv.stride, conv.padding, conv.dilation)

    y = x = x.to(dtype)
    for conv in chain[:-1]:
        y = torch.relu(run(y, conv))
    y = run(y, chain[-1])
    if adds:
        y = y + (run(x, projection) if projection else x)
    return torch.relu(y)


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "contiguous": lambda x: x.contiguous(),
    "a slice of channels": lambda x: F.pad(x, (0, 0, 0, 0, 3, 2), value=float("nan"))
    .contiguous(memory_format=torch.channels_last)[:, 3 : 3 + x.size(1)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_agrees_with_its_convolutions(name: str, dtype: torch.dtype, layout: str) -> None:
    shape, convolutions, shortcut = BLOCKS[name]
    chain, projection = folded(shape, convolutions, shortcut)
    x = LAYOUTS[layout](torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    block = pack_residual_block(chain, projection, shortcut=shortcut is not None, like=x)
    if block is None:
        pytest.skip(f"{dtype} convolutions are the library's here")
    out = residual_stage(x, block)
    truth = in_turn(x, chain, projection, shortcut is not None, torch.float64)
    eager = in_turn(x, chain, projection, shortcut is not None, dtype)
    assert out.dtype == dtype and out.shape == truth.shape
    assert out.is_contiguous(memory_format=torch.contiguous_format if layout == "contiguous" else torch.channels_last)
    if out.numel():
        # Three roundings to bfloat16 in a row, and in float32 the sums' own order: eager's error is of the same size.
        floor = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        assert (out - truth).abs().max() <= 2 * (eager - truth).abs().max() + floor


def test_every_image_gets_the_same_result_alone_and_in_a_batch() -> None:
    shape, convolutions, shortcut = BLOCKS["bottleneck, projected"]
    chain, projection = folded(shape, convolutions, shortcut)
    x = torch.randn(7, *shape[1:]).contiguous(memory_format=torch.channels_last)
    block = pack_residual_block(chain, projection, shortcut=True, like=x)
    together = residual_stage(x, block)
    for i in range(7):
        torch.testing.assert_close(residual_stage(x[i : i + 1], block), together[i : i + 1], rtol=1e-6, atol=1e-6)


def test_groups_and_other_dtypes_are_left_to_single_convolutions() -> None:
    weight = torch.randn(4, 2, 3, 3)
    assert pack_residual_block([FoldedConv(weight, None, padding=1, groups=2)], None, shortcut=True, like=torch.randn(1, 4, 5, 5)) is None
    weight = torch.randn(4, 4, 3, 3)
    for dtype in (torch.float64, torch.float16):
        like = torch.randn(1, 4, 5, 5).to(dtype)
        assert pack_residual_block([FoldedConv(weight, None, padding=1)], None, shortcut=True, like=like) is None


def test_blocks_that_do_not_fit_are_refused() -> None:
    x = torch.randn(2, 8, 6, 6)
    same = FoldedConv(torch.randn(8, 8, 3, 3), None, padding=1)
    shrinks = FoldedConv(torch.randn(8, 8, 3, 3), None)
    with pytest.raises(RuntimeError, match=r"shortcut gives \(8, 6, 6\), but the convolutions give \(8, 4, 4\)"):
        residual_stage(x, pack_residual_block([shrinks], None, shortcut=True, like=x))
    with pytest.raises(RuntimeError, match=r"shortcut gives \(8, 4, 4\), but the convolutions give \(8, 6, 6\)"):
        residual_stage(x, pack_residual_block([same], shrinks, shortcut=True, like=x))
    with pytest.raises(RuntimeError, match="a convolution of 8 channels meets an input of 7"):
        residual_stage(x[:, :7], pack_residual_block([same], None, shortcut=False, like=x))
    with pytest.raises(RuntimeError, match="larger than the padded input"):
        residual_stage(x[:, :, :2, :2], pack_residual_block([shrinks], None, shortcut=False, like=x))
    with pytest.raises(RuntimeError, match="x must be float32 or bfloat16"):
        residual_stage(x.double(), pack_residual_block([same], None, shortcut=True, like=x))
    block = pack_residual_block([same], None, shortcut=True, like=x)
    with pytest.raises(RuntimeError, match="10 values of geometry per packed weight"):
        residual_stage(x, block._replace(geometry=block.geometry[:-1]))
    with pytest.raises(RuntimeError, match="10 values of geometry per packed weight"):
        residual_stage(x, block._replace(projects=True))


def test_nan_stays_in_its_own_image() -> None:
    shape, convolutions, shortcut = BLOCKS["basic"]
    chain, _ = folded(shape, convolutions, shortcut)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    x[2] = float("nan")
    block = pack_residual_block(chain, None, shortcut=True, like=x)
    out = residual_stage(x, block)
    assert out[2].isnan().all() and not out[[0, 1, 3, 4]].isnan().any()


def test_the_modules_use_it_in_eval_and_only_there() -> None:
    block = fused_cnn.nn.BasicBlock(8, 8).eval()
    x = torch.randn(2, 8, 6, 6)
    counted = _library.kernel("residual_stage_packed_fwd", "native")
    for grad, expected in ((False, 1), (True, 0)):
        with torch.set_grad_enabled(grad), torch.profiler.profile() as profile:
            block(x)
        assert sum(event.name == counted.name() for event in profile.events()) == expected
