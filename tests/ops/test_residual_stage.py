"""Residual blocks that run as one op, against their convolutions in float64."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_cnn
from fused_cnn import _library
from fused_cnn.ops import FoldedConv, pack_residual_block, residual_stage

pytestmark = pytest.mark.usefixtures("two_threads", "nan_filled_memory")
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU's form of the block")
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cpu" else [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


# name: x's shape, the convolutions (out, kernel, stride, padding, dilation), the shortcut ("x", None, or (out, kernel,
# stride))
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
    torch.manual_seed(0)

    def make(channels: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> FoldedConv:
        weight = torch.randn(out, channels, kernel, kernel) / (channels * kernel * kernel) ** 0.5
        return FoldedConv(weight, torch.randn(out), stride, padding, dilation)

    chain, channels = [], shape[1]
    for conv in convolutions:
        chain.append(make(channels, *conv))
        channels = conv[0]
    return chain, make(shape[1], *shortcut, 0, 1) if isinstance(shortcut, tuple) else None


def in_turn(
    x: Tensor, chain: list[FoldedConv], projection: FoldedConv | None, adds: bool, dtype: torch.dtype
) -> Tensor:
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
    "a slice of channels": lambda x: F.pad(x, (0, 0, 0, 0, 3, 2), value=float("nan")).contiguous(
        memory_format=torch.channels_last
    )[:, 3 : 3 + x.size(1)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_agrees_with_its_convolutions(name: str, dtype: torch.dtype, layout: str) -> None:
    shape, convolutions, shortcut = BLOCKS[name]
    chain, projection = folded(shape, convolutions, shortcut)
    x = LAYOUTS[layout](torch.randn(shape).to(dtype))
    block = pack_residual_block(chain, projection, shortcut=shortcut is not None, like=x)
    if block is None:
        pytest.skip(f"{dtype} convolutions are oneDNN's here")
    out = residual_stage(x, block)
    truth = in_turn(x, chain, projection, shortcut is not None, torch.float64)
    eager = in_turn(x, chain, projection, shortcut is not None, dtype)
    assert out.dtype == dtype and out.shape == truth.shape
    assert out.is_contiguous(memory_format=torch.contiguous_format if layout == "contiguous" else torch.channels_last)
    if out.numel():
        # Three roundings to bfloat16 in a row, and in float32 the sums' own order: eager's error is of the same size.
        floor = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        assert (out - truth).abs().max() <= 2 * (eager - truth).abs().max() + floor


# name: x's shape, the first block's convolutions and shortcut, how many more blocks follow it, and their convolutions
POINTWISE_LAST, SQUARE_LAST = (
    [(16, 1, 1, 0, 1), (16, 3, 1, 1, 1), (64, 1, 1, 0, 1)],
    [(24, 3, 1, 1, 1), (24, 3, 1, 1, 1)],
)
STAGES = {
    "bottlenecks": ((3, 64, 14, 14), POINTWISE_LAST, "x", 3, POINTWISE_LAST),
    "bottlenecks, projected": (
        (2, 32, 15, 13),
        [(8, 1, 1, 0, 1), (8, 3, 2, 1, 1), (64, 1, 1, 0, 1)],
        (64, 1, 2),
        2,
        POINTWISE_LAST,
    ),
    "basic, two": ((5, 24, 7, 7), SQUARE_LAST, "x", 1, SQUARE_LAST),
    "basic, three, projected": ((2, 17, 9, 9), [(24, 3, 2, 1, 1), (24, 3, 1, 1, 1)], (24, 1, 2), 2, SQUARE_LAST),
    "a single 1x1 each": ((2, 40, 6, 6), [(40, 1, 1, 0, 1)], "x", 2, [(40, 1, 1, 0, 1)]),
    "no shortcut at first": ((2, 16, 8, 8), SQUARE_LAST, None, 1, SQUARE_LAST),
    "empty batch": ((0, 24, 7, 7), SQUARE_LAST, "x", 2, SQUARE_LAST),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_agrees_with_its_blocks_one_by_one(name: str, dtype: torch.dtype, layout: str) -> None:
    shape, convolutions, shortcut, more, later = STAGES[name]
    x = LAYOUTS[layout](torch.randn(shape).to(dtype))
    chain, projection = folded(shape, convolutions, shortcut)
    rest, _ = folded((0, convolutions[-1][0]), later, "x")
    stage = pack_residual_block(chain, projection, shortcut=shortcut is not None, like=x)
    block = pack_residual_block(rest, None, shortcut=True, like=x)
    if stage is None or block is None:
        pytest.skip(f"{dtype} convolutions are oneDNN's here")
    before, expected = x.clone(), residual_stage(x, stage)
    for _ in range(more):
        expected, stage = residual_stage(expected, block), stage.then(block)
    torch.testing.assert_close(residual_stage(x, stage), expected, rtol=0, atol=0)  # the same sums in the same order
    assert torch.equal(x, before)


@on_cpu
def test_every_image_gets_the_same_result_alone_and_in_a_batch() -> None:
    shape, convolutions, shortcut = BLOCKS["bottleneck, projected"]
    chain, projection = folded(shape, convolutions, shortcut)
    x = torch.randn(7, *shape[1:]).contiguous(memory_format=torch.channels_last)
    block = pack_residual_block(chain, projection, shortcut=True, like=x)
    together = residual_stage(x, block)
    for i in range(7):
        torch.testing.assert_close(residual_stage(x[i : i + 1], block), together[i : i + 1], rtol=1e-6, atol=1e-6)


@on_cpu
def test_groups_and_other_dtypes_are_left_to_single_convolutions() -> None:
    weight = torch.randn(4, 2, 3, 3)
    assert (
        pack_residual_block(
            [FoldedConv(weight, None, padding=1, groups=2)], None, shortcut=True, like=torch.randn(1, 4, 5, 5)
        )
        is None
    )
    weight = torch.randn(4, 4, 3, 3)
    for dtype in (torch.float64, torch.float16):
        like = torch.randn(1, 4, 5, 5).to(dtype)
        assert pack_residual_block([FoldedConv(weight, None, padding=1)], None, shortcut=True, like=like) is None


@on_cpu
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
    with pytest.raises(RuntimeError, match=r"blocks of 2 convolutions in all, .* need as many packed weights, got 1"):
        residual_stage(x, block._replace(projects=True))
    with pytest.raises(RuntimeError, match="at least 1 convolution, got 0"):
        residual_stage(x, block._replace(lengths=[0, 1]))
    narrows = pack_residual_block([FoldedConv(torch.randn(4, 8, 3, 3), None, padding=1)], None, shortcut=True, like=x)
    with pytest.raises(RuntimeError, match=r"shortcut gives \(8, 6, 6\), but the convolutions give \(4, 6, 6\)"):
        residual_stage(x, block.then(narrows))


def test_nan_stays_in_its_own_image() -> None:
    shape, convolutions, shortcut = BLOCKS["basic"]
    chain, _ = folded(shape, convolutions, shortcut)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    x[2] = float("nan")
    block = pack_residual_block(chain, None, shortcut=True, like=x)
    out = residual_stage(x, block)
    assert out[2].isnan().all() and not out[[0, 1, 3, 4]].isnan().any()


def blocks_run(module: torch.nn.Module, x: Tensor) -> list[int]:
    """The number of blocks in each call of the op that module(x) makes."""
    found = []
    kernel = _library.kernel("residual_stage_packed_fwd", "native")

    class Listen(TorchDispatchMode):
        sees_fused_ops = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is kernel:
                found.append(len(args[3]))
            return func(*args, **(kwargs or {}))

    with Listen():
        module(x)
    return found


def stage_of_three() -> fused_cnn.nn.ResidualStage:
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    first = fused_cnn.nn.Bottleneck(8, 4, 2, down)
    return fused_cnn.nn.ResidualStage(first, fused_cnn.nn.Bottleneck(16, 4), fused_cnn.nn.Bottleneck(16, 4)).eval()


def test_the_modules_use_it_in_eval_and_only_there() -> None:
    block, stage, x = fused_cnn.nn.BasicBlock(8, 8).eval(), stage_of_three(), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert blocks_run(block, x) == [1] and blocks_run(stage, x) == [3] and blocks_run(stage, x) == [3]
        stage.train()
        assert blocks_run(stage, x) == []
    assert blocks_run(block, x) == [] and blocks_run(stage.eval(), x) == []


@torch.no_grad()
def test_a_stage_steps_back_where_somebody_watches() -> None:
    stage, x = stage_of_three(), torch.randn(2, 8, 6, 6)
    expected = stage(x)
    assert blocks_run(stage, x) == [3]
    inner = {
        stage[1]: [1, 1, 1],  # a block: each block by itself
        stage[1].conv2: [1, 1],  # a convolution: its block falls apart
        stage[1].relu: [1, 1],
        stage[0].downsample: [1, 1],
        stage[0].downsample[0]: [1, 1],
    }
    for module, runs in inner.items():
        seen: list[object] = []
        handle = module.register_forward_hook(lambda m, *args, seen=seen: seen.append(m))
        assert blocks_run(stage, x) == runs, module
        assert seen or module is stage[1].relu
        torch.testing.assert_close(stage(x), expected, rtol=1e-4, atol=1e-5)
        handle.remove()
        assert blocks_run(stage, x) == [3]


@torch.no_grad()
def test_a_stage_sees_every_change_of_its_blocks() -> None:
    stage, x = stage_of_three(), torch.randn(2, 8, 6, 6)

    def changes(change) -> None:  # type: ignore[no-untyped-def]
        before = stage(x)
        change()
        after = stage(x)
        torch.testing.assert_close(after, copy.deepcopy(stage)(x))  # a copy has no caches
        assert not torch.equal(before, after)

    changes(lambda: stage[2].conv3.weight.mul_(2))
    changes(lambda: stage[1].bn1.running_var.fill_(3))
    changes(lambda: setattr(stage[1].bn1, "eps", 0.5))
    changes(lambda: setattr(stage[0].downsample[0].weight, "data", stage[0].downsample[0].weight * -3))
    changes(lambda: setattr(stage[0], "conv1", nn.Conv2d(8, 4, 1, bias=False)))
    changes(lambda: setattr(stage[2].bn2, "bias", nn.Parameter(torch.ones(4))))
    changes(lambda: stage.append(fused_cnn.nn.Bottleneck(16, 4).eval()))
    changes(lambda: stage.__delitem__(1))
    changes(lambda: stage[1].bn2.train())


@torch.no_grad()
def test_a_stage_goes_back_to_plain_blocks() -> None:
    stage, x = stage_of_three(), torch.randn(2, 8, 6, 6)
    stage(x)
    plain = fused_cnn.unfuse_(copy.deepcopy(stage))
    assert all(block.backend == "reference" for block in plain) and list(plain.state_dict()) == list(stage.state_dict())
    assert blocks_run(plain, x) == []
    torch.testing.assert_close(stage(x), plain(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_stage_means_what_a_sequential_means() -> None:
    first, second, x = fused_cnn.nn.BasicBlock(8, 8), fused_cnn.nn.BasicBlock(8, 8), torch.randn(2, 8, 6, 6)

    class Doubled(fused_cnn.nn.BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    twice = fused_cnn.nn.ResidualStage(first, second, second).eval()
    torch.testing.assert_close(twice(x), second(second(first(x))))
    subclass = Doubled(8, 8)
    torch.testing.assert_close(fused_cnn.nn.ResidualStage(first, subclass).eval()(x), subclass(first(x)))
    with torch.inference_mode():  # parameters that do not count their changes
        assert fused_cnn.nn.ResidualStage(fused_cnn.nn.BasicBlock(8, 8)).eval()(x).shape == x.shape
    stage = fused_cnn.nn.ResidualStage(first, second).eval()
    for module, name, value in (
        (first.conv1, "padding_mode", "reflect"),
        (second, "residual", False),
        (second, "backend", "reference"),
    ):
        stage(x)
        setattr(module, name, value)
        torch.testing.assert_close(stage(x), copy.deepcopy(stage)(x))


@torch.no_grad()
def test_unfusing_keeps_what_was_done_to_a_stage_since() -> None:
    blocks = [fused_cnn.nn.BasicBlock(8, 8, backend="reference") for _ in range(4)]
    model = nn.Sequential(nn.Sequential(*blocks[:3])).eval()
    fused_cnn.fuse_(model)
    assert isinstance(model[0], fused_cnn.nn.ResidualStage)
    del model[0][1]
    model[0].append(blocks[3])
    x = torch.randn(2, 8, 6, 6)
    expected = model(x)
    fused_cnn.unfuse_(model)
    assert (
        type(model[0]) is nn.Sequential
        and [b is blocks[i] for b, i in zip(model[0], (0, 2, 3), strict=True)] == [True] * 3
    )
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_shortcut_of_ones_own_has_its_gradients() -> None:
    """Though the block's own convolutions are frozen, and its input asks for none."""
    down = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))
    block, x = fused_cnn.nn.BasicBlock(8, 16, 2, down).eval(), torch.randn(2, 8, 6, 6)
    for name, p in block.named_parameters():
        p.requires_grad_(name.startswith("downsample"))
    with torch.no_grad():
        block(x)  # folded weights are at hand
    plain = fused_cnn.unfuse_(copy.deepcopy(block))
    for module in (block, plain):
        module(x).square().sum().backward()
    for mine, theirs in zip(block.downsample.parameters(), plain.downsample.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_block_of_one_channel_is_channels_last_where_its_weights_are() -> None:
    down = nn.Sequential(nn.Conv2d(1, 16, 1), nn.BatchNorm2d(16))
    block = fused_cnn.nn.BasicBlock(1, 16, 1, down).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 1, 6, 6)
    plain = fused_cnn.unfuse_(copy.deepcopy(block))
    assert block(x).stride() == plain(x).stride()
