"""The drop-in modules by themselves: against plain PyTorch, in every form, converted both ways, and honest about wrong
input."""

import copy
import importlib

import pytest
import torch
from conftest import DEVICE
from torch import Tensor, nn
from torchvision.models import resnet

from fused_cnn import _library, fuse_, max_pool2d, unfuse_
from fused_cnn._backends import BackendUnavailable
from fused_cnn.nn import BasicBlock, Bottleneck, ConvBNReLU, FusedModule, Inception, MaxPool2d

googlenet = importlib.import_module("torchvision.models.googlenet")  # the function of that name hides the module


def lively(module: nn.Module) -> nn.Module:
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low, high in (
                (m.running_mean, -0.2, 0.2),
                (m.running_var, 0.5, 1.5),
                (m.weight, 0.6, 1.4),
                (m.bias, -0.3, 0.3),
            ):
                t.data.uniform_(low, high)
    return module.to(DEVICE)


WIDTHS = (8, 6, 10, 3, 5, 7)
MODULES = {
    "conv": lambda b: ConvBNReLU(16, 24, 3, stride=2, padding=1, backend=b),
    "conv without norm": lambda b: ConvBNReLU(16, 24, 3, padding=1, bias=True, norm=False, backend=b),
    "conv without relu": lambda b: ConvBNReLU(16, 24, 1, relu=False, backend=b),
    "conv in groups": lambda b: ConvBNReLU(16, 24, 3, padding=1, groups=4, bias=True, backend=b),
    "inception": lambda b: Inception(16, *WIDTHS, backend=b),
    "inception 5x5": lambda b: Inception(16, *WIDTHS, kernel5=5, backend=b),
    "inception without norm": lambda b: Inception(16, *WIDTHS, kernel5=5, norm=False, bias=True, backend=b),
    "inception naive": lambda b: Inception(16, *WIDTHS, reduce=False, backend=b),
    "inception naive without norm": lambda b: Inception(16, *WIDTHS, reduce=False, norm=False, bias=True, backend=b),
    "basic block": lambda b: BasicBlock(16, 16, backend=b),
    "basic block, projected": lambda b: BasicBlock(16, 24, 2, projection(16, 24, 2), backend=b),
    "basic block, plain": lambda b: BasicBlock(16, 24, 2, residual=False, backend=b),
    "bottleneck": lambda b: Bottleneck(16, 4, backend=b),
    "bottleneck, projected": lambda b: Bottleneck(16, 8, 2, projection(16, 32, 2), backend=b),
    "bottleneck, grouped and dilated": lambda b: Bottleneck(16, 4, groups=2, base_width=64, dilation=2, backend=b),
    "max pool": lambda b: MaxPool2d(3, 2, 1, ceil_mode=True, backend=b),
}


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["eval", "eval with gradients", "train"])
@pytest.mark.parametrize("name", MODULES)
def test_fused_is_as_close_to_float64_as_eager_is(name: str, mode: str, dtype: torch.dtype) -> None:
    fused = lively(MODULES[name](None)).to(dtype=dtype, memory_format=torch.channels_last)
    eager = copy.deepcopy(fused)
    for m in eager.modules():
        if isinstance(m, FusedModule):
            m.backend = "reference"
    x = torch.randn(4, 16, 9, 9, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
    double = copy.deepcopy(eager).double()
    results = []
    for module, inputs in ((double, x.double()), (eager, x), (fused, x)):
        module.train(mode == "train")
        inputs = inputs.clone().requires_grad_(mode != "eval")
        with torch.set_grad_enabled(mode != "eval"):
            out = module(inputs)
        found = [out.detach()]
        if mode != "eval":
            seed = torch.Generator(DEVICE).manual_seed(1)
            grad = torch.randn(out.shape, generator=seed, device=DEVICE)
            found += torch.autograd.grad(out, [inputs, *module.parameters()], grad.to(out.dtype))
        results.append(found)
    floor = 16 * torch.finfo(dtype).eps
    for truth, theirs, mine in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        scale = truth.norm().item() + 1e-12
        assert (mine.double() - truth).norm().item() / scale <= 3 * (
            theirs.double() - truth
        ).norm().item() / scale + floor
    for key, value in double.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key].double(), value.double(), rtol=0.02, atol=0.02)


REFERENCES = {
    "BasicConv2d": (ConvBNReLU, lambda: googlenet.BasicConv2d(16, 24, kernel_size=3)),
    "Inception": (Inception, lambda: googlenet.Inception(16, *WIDTHS)),
    "BasicBlock": (BasicBlock, lambda: resnet.BasicBlock(16, 16)),
    "Bottleneck": (Bottleneck, lambda: resnet.Bottleneck(16, 4)),
    "MaxPool2d": (MaxPool2d, lambda: nn.MaxPool2d(3, 2, 1)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_block_by_itself_is_fused_and_back(name: str) -> None:
    kind, build = REFERENCES[name]
    block = lively(build()).eval()
    foreign = type(block)
    x = torch.randn(2, 16, 9, 9, device=DEVICE)
    with torch.no_grad():
        expected = block(x)
        assert len(fuse_(block).fused) == 1
        assert isinstance(block, kind) and isinstance(block, foreign)
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
        assert unfuse_(block) is block and [type(m) for m in block.modules()] == [type(m) for m in build().modules()]
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize("name", MODULES)
def test_an_own_module_unfused_is_plain_pytorch(name: str) -> None:
    fused = lively(MODULES[name](None)).eval()
    plain = unfuse_(copy.deepcopy(fused))
    assert all(m.backend == "reference" for m in plain.modules() if isinstance(m, FusedModule))
    x = torch.randn(2, 16, 9, 9, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_changed_setting_is_seen_at_the_next_forward() -> None:
    x = torch.randn(2, 16, 9, 9, device=DEVICE)
    block = lively(MODULES["inception"](None)).eval()
    for layer, settings in ((block.branch2[1], {"relu": False}), (block.branch4[0], {"kernel_size": 5, "padding": 2})):
        before = block(x)
        layer.__dict__.update(settings)
        after = block(x)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, copy.deepcopy(block)(x))  # a copy has no folded weights


@pytest.mark.parametrize("train", [False, True])
def test_branches_of_different_sizes_are_named(train: bool) -> None:
    block = Inception(16, *WIDTHS).to(DEVICE).train(train)
    block.branch3[1].conv.padding = (0, 0)
    with pytest.raises(ValueError, match=r"branch3 gives \(7, 7\), but branch1 gives \(9, 9\)"):
        block(torch.randn(2, 16, 9, 9, device=DEVICE, requires_grad=True))


def test_empty_batch_goes_through_every_module() -> None:
    for name, build in MODULES.items():
        module = build(None).eval().to(DEVICE)
        with torch.no_grad():
            assert module(torch.randn(0, 16, 9, 9, device=DEVICE)).shape[0] == 0, name


def test_momentum_none_and_untracked_statistics_are_batch_norms_own() -> None:
    for options in ({"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"eps": 0.1}):
        fused = ConvBNReLU(16, 8, 1).to(DEVICE)
        fused.bn = nn.BatchNorm2d(8, **options).to(DEVICE)
        plain = nn.Sequential(copy.deepcopy(fused.conv), copy.deepcopy(fused.bn), nn.ReLU())
        for step in range(3):
            x = torch.randn(4, 16, 5, 5, device=DEVICE)
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
            fused.eval(), plain.eval()
            with torch.no_grad():
                torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5, msg=f"{options} step {step}")
            fused.train(), plain.train()
        for key, value in plain[1].state_dict().items():
            torch.testing.assert_close(fused.bn.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "block, expected",
    [
        (ConvBNReLU(16, 8, 3), r"x has shape \(1, 4, 9, 9\), but the weight takes 16 input channels"),
        (BasicBlock(16, 16), "a convolution of 16 channels meets an input of 4"),
        (Inception(16, 8, 8, 8, 8, 8, 8), r"x has shape \(1, 4, 9, 9\), but the weights take 16 input channels"),
        # Which pads to as many bytes.
        (Inception(3, 8, 8, 8, 8, 8, 8), r"x has shape \(1, 4, 9, 9\), but the weights take 3 input channels"),
    ],
    ids=["convolution", "block", "inception", "inception of three"],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_channels_that_an_input_should_have_are_named(block: nn.Module, expected: str, autocast: bool) -> None:
    eager, x = unfuse_(copy.deepcopy(block).eval()), torch.randn(1, 4, 9, 9)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with pytest.raises(RuntimeError):
            eager(x)
        with pytest.raises(RuntimeError, match=expected):
            block.eval()(x)


def test_basic_block_refuses_what_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="BasicBlock takes groups=1, base_width=64 and dilation=1, got 2"):
        BasicBlock(8, 8, groups=2)


def test_a_pool_is_pytorchs_where_the_backend_that_is_named_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As native has on a GPU: a network that is fused with backend="native" runs there."""
    monkeypatch.setitem(_library._implemented, ("max_pool2d_fwd", "native", DEVICE), False)
    x = torch.randn(2, 5, 7, 7, device=DEVICE)
    assert torch.equal(MaxPool2d(3, 2, backend="native")(x), nn.MaxPool2d(3, 2)(x))
    with pytest.raises(BackendUnavailable, match="has no kernel for max_pool2d_fwd"):
        max_pool2d(x, 3, 2, backend="native")


def _train_in_a_process(rank: int, world: int, address: str, results: object) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    torch.manual_seed(0)
    model = nn.Sequential(Bottleneck(16, 4), Inception(16, *WIDTHS))
    wrapped = nn.parallel.DistributedDataParallel(model)
    x = torch.randn(world, 4, 16, 9, 9)[rank]
    wrapped(x).square().mean().backward()
    results[rank] = [p.grad.clone() for p in model.parameters()]  # type: ignore[index]
    dist.destroy_process_group()


def test_two_processes_average_their_gradients(tmp_path: object) -> None:
    """DistributedDataParallel over gloo, in real processes, on the CPU: on GPUs it needs two. The mean of what each
    shard gives alone."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Manager().dict()
    address = f"file://{tmp_path}/rendezvous"
    torch.multiprocessing.spawn(_train_in_a_process, args=(2, address, results), nprocs=2)
    torch.manual_seed(0)
    model = nn.Sequential(Bottleneck(16, 4), Inception(16, *WIDTHS))
    shards = torch.randn(2, 4, 16, 9, 9)
    alone: list[list[Tensor]] = []
    for shard in shards:
        model.zero_grad()
        model(shard).square().mean().backward()
        alone.append([p.grad.clone() for p in model.parameters()])
    for rank in range(2):
        for actual, first, second in zip(results[rank], *alone, strict=True):
            torch.testing.assert_close(actual, (first + second) / 2, rtol=1e-4, atol=1e-6)


_pays = FusedModule._fused_pays  # the fixture in conftest.py has all inputs pay


@pytest.mark.skipif(DEVICE == "cuda", reason="the processor's rule")
def test_on_a_cpu_training_is_pytorchs_where_a_fused_run_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs, and contiguous memory where nothing asks for channels_last; not a backend asked for by name."""
    monkeypatch.setattr(FusedModule, "_fused_pays", _pays)
    ran: list[str] = []
    for kind in (BasicBlock, Inception):
        unfolded = kind.fused_run_unfolded
        monkeypatch.setattr(
            kind, "fused_run_unfolded", lambda self, x, f=unfolded: (ran.append(type(self).__name__), f(self, x))[1]
        )
    small, large = torch.randn(1, 16, 8, 8), torch.randn(3, 16, 112, 112)

    def runs(block: nn.Module, x: Tensor, channels_last: bool = False) -> bool:
        block = block.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        ran.clear()
        block(x.contiguous(memory_format=torch.channels_last) if channels_last else x).sum().backward()
        return bool(ran)

    for block, contiguous in ((BasicBlock(16, 16), False), (Inception(16, *WIDTHS), True)):
        assert not runs(block, small) and not runs(block, small, True)
        assert runs(block, large) == contiguous and runs(block, large, True)
    assert runs(BasicBlock(16, 16, backend="native"), small)
