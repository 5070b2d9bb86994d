"""fuse_ on real torchvision and timm models: same numbers, same names, shared parameters, reversible, and honest about
what it leaves."""

import copy
import functools
import importlib
import inspect
import io
import pickle
import types
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from conftest import DEVICE
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fused_cnn
from fused_cnn import FusionReport, fuse_, unfuse_
from fused_cnn import models as own_models

googlenet = importlib.import_module("torchvision.models.googlenet")  # the function of that name hides the module


def lively(model: nn.Module) -> nn.Module:
    """BatchNorm statistics and weights that are not trivial, so that a fold that forgets one shows."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.6, 1.4),
                (module.bias, -0.3, 0.3),
            ):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
        elif isinstance(module, (nn.Dropout, nn.modules.dropout._DropoutNd)):
            module.p = 0.0  # so that two training passes can be compared
    return model.to(DEVICE, memory_format=torch.channels_last)


def tv(name: str, **options: object) -> nn.Module:
    weights = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return getattr(torchvision.models, name)(weights=None, **(weights | options))


MODELS = {
    "googlenet": (lambda: tv("googlenet"), 64, 18),
    "resnet18": (lambda: tv("resnet18"), 64, 10),
    "resnet50": (lambda: tv("resnet50"), 64, 18),
    "resnext50_32x4d": (lambda: tv("resnext50_32x4d"), 64, 18),
    "resnet50 dilated": (lambda: tv("resnet50", replace_stride_with_dilation=[False, True, True]), 64, 18),
    "inception_v3": (lambda: tv("inception_v3"), 96, 98),
    "timm resnet18": (lambda: timm.create_model("resnet18"), 64, 10),
    "timm resnet50": (lambda: timm.create_model("resnet50"), 64, 18),
    "timm resnet26d": (lambda: timm.create_model("resnet26d"), 64, 9),
}
each_model = pytest.mark.parametrize("name", MODELS)


def pair(name: str) -> tuple[nn.Module, nn.Module, FusionReport, Tensor]:
    torch.manual_seed(0)
    build, side, _ = MODELS[name]
    eager = lively(build())
    fused = copy.deepcopy(eager)
    report = fuse_(fused)
    x = torch.randn(2, 3, side, side, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return eager, fused, report, x


def logits(out: object) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]  # type: ignore[index]


def relative(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


@each_model
def test_eval_agrees_with_float64_as_well_as_eager_does(name: str) -> None:
    eager, fused, report, x = pair(name)
    assert len(report.fused) == MODELS[name][2], report
    eager.eval(), fused.eval()
    if name == "inception_v3":
        eager.aux_logits = fused.aux_logits = False
    with torch.no_grad():
        mine, theirs = logits(fused(x)), logits(eager(x))
        truth = logits(eager.double()(x.double()))
    assert relative(mine, truth) <= 2 * relative(theirs, truth) + 1e-6


@pytest.mark.parametrize("name", ["googlenet", "resnet18", "resnet50", "timm resnet50"])
def test_a_training_step_agrees(name: str) -> None:
    eager, fused, _, x = pair(name)
    x = torch.randn(8, *x.shape[1:], device=DEVICE)  # BatchNorm over few values is chaotic in any arithmetic
    double = copy.deepcopy(eager).double()
    for model, inputs in ((eager, x), (fused, x), (double, x.double())):
        logits(model.train()(inputs)).square().mean().backward()
    for key, buffer in double.state_dict().items():
        if "running" in key:
            assert relative(fused.state_dict()[key], buffer) <= 2 * relative(eager.state_dict()[key], buffer) + 1e-6, (
                key
            )
    used = [
        (k, p, q, r)
        for (k, p), q, r in zip(
            # Fmt: skip.
            double.named_parameters(),
            eager.parameters(),
            fused.parameters(),
            strict=True,
        )
        if p.grad is not None
    ]
    errors = torch.tensor([[relative(q.grad, p.grad), relative(r.grad, p.grad)] for _, p, q, r in used])
    # One parameter may be luckier in eager; over all of them the contract's factor of three holds, and no single one is
    # far off.
    assert errors[:, 1].median() <= 3 * errors[:, 0].median() + 1e-6
    assert errors[:, 1].max() <= 3 * errors[:, 0].max() + 1e-6


@each_model
def test_names_parameters_and_buffers_are_the_very_same(name: str) -> None:
    model = MODELS[name][0]()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    fuse_(model)
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[k] is p for k, p in parameters.items())
    assert all(dict(model.named_buffers())[k] is b for k, b in buffers.items())


@each_model
def test_unfuse_restores_every_class_and_number(name: str) -> None:
    eager, fused, _, x = pair(name)
    eager.eval(), fused.eval()
    unfuse_(fused)
    for before, after in zip(eager.modules(), fused.modules(), strict=True):
        assert type(after) is type(before) and after.training == before.training
    with torch.no_grad():
        assert torch.equal(logits(fused(x)), logits(eager(x)))


@pytest.mark.parametrize("name", ["googlenet", "resnet50", "timm resnet18"])
def test_deepcopy_pickle_and_save_keep_a_fused_model_working(name: str) -> None:
    _, fused, _, x = pair(name)
    fused.eval()
    buffer = io.BytesIO()
    with torch.no_grad():
        expected = logits(fused(x))
        torch.save(fused, buffer)
        copies = {
            "deepcopy": copy.deepcopy(fused),
            "pickle": pickle.loads(pickle.dumps(fused)),
            "torch.save": torch.load(io.BytesIO(buffer.getvalue()), weights_only=False),
        }
        for how, other in copies.items():
            other(x)  # unfused, as a copy's first call is
            assert torch.equal(logits(other(x)), expected), how
            next(other.parameters()).add_(0.1)
            assert not torch.equal(logits(other(x)), expected), f"{how}: the copy's own weights are not read"
        assert torch.equal(logits(fused(x)), expected), "a copy shares memory with the original"
        for other in copies.values():
            unfuse_(other)
            assert not any(isinstance(m, fused_cnn.nn.FusedModule) for m in other.modules())


def its_own_forward(self: nn.Module, x: Tensor) -> Tensor:
    return 2 * type(self).forward(self, x)


CYCLES = {
    "a block's forward is a method of its own": (
        lambda m: setattr(m.layer1[0], "forward", types.MethodType(its_own_forward, m.layer1[0])),
        lambda m: m.layer1[0].forward.__self__ is m.layer1[0],
    ),
    "a block's forward is a partial": (
        lambda m: setattr(m.layer1[0], "forward", functools.partial(its_own_forward, m.layer1[0])),
        lambda m: m.layer1[0].forward.args[0] is m.layer1[0],
    ),
    "the network's forward is a method of its own": (
        lambda m: setattr(m, "forward", types.MethodType(its_own_forward, m)),
        lambda m: m.forward.__self__ is m,
    ),
    "a block knows its network": (lambda m: vars(m.layer1[0]).update(parent=m), lambda m: m.layer1[0].parent is m),
    "a block is in a list of its own": (
        lambda m: setattr(m.layer1[0], "me", [m.layer1[0]]),
        lambda m: m.layer1[0].me[0] is m.layer1[0],
    ),
}
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": lambda m: torch.load(io.BytesIO(saved(m)), weights_only=False),
    "averaged": lambda m: torch.optim.swa_utils.AveragedModel(m).module,
}


def saved(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("cycle", CYCLES)
def test_a_copy_refers_to_itself_where_its_original_does(cycle: str, how: str) -> None:
    """As an eager model's copy does, wherever that can be copied: a patched method is not pickled by its name."""
    eager, fused, _, x = pair("resnet18")
    change, holds = CYCLES[cycle]
    for model in (eager.eval(), fused.eval()):
        change(model)
    try:
        theirs = COPIES[how](eager)
    except AttributeError:
        with pytest.raises(AttributeError, match="its_own_forward"):
            COPIES[how](fused)
        return
    mine = COPIES[how](fused)
    assert holds(theirs) and holds(mine)
    assert [type(m) for m in mine.modules()] == [type(m) for m in fused.modules()]
    with torch.no_grad():
        torch.testing.assert_close(mine(x), theirs(x), rtol=1e-3, atol=1e-4)


def test_state_dicts_load_both_ways() -> None:
    eager, fused, _, x = pair("resnet18")
    other = tv("resnet18")
    other.load_state_dict(fused.state_dict(), strict=True)
    fused.load_state_dict(lively(tv("resnet18")).state_dict(), strict=True)
    for assign in (False, True):
        fused.load_state_dict(eager.state_dict(), strict=True, assign=assign)
        eager.eval(), fused.eval()
        with torch.no_grad():
            torch.testing.assert_close(fused(x), eager(x), rtol=1e-3, atol=1e-4)


def sgd_step(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model.eval()(x).square().mean().backward()
    optimizer.step()


CHANGES = {
    "optimizer step": sgd_step,
    "load_state_dict": lambda m, x: m.load_state_dict(
        {k: v * 1.01 if v.is_floating_point() else v for k, v in m.state_dict().items()}
    ),
    "in-place weight": lambda m, x: m.layer1[0].conv1.weight.mul_(1.5),
    "running_var": lambda m, x: m.layer2[0].bn2.running_var.mul_(2.0),
    "bn bias": lambda m, x: m.bn1.bias.add_(0.1),
    "new parameter": lambda m, x: setattr(m.layer1[1].conv2, "weight", nn.Parameter(m.layer1[1].conv2.weight * 0.9)),
    "bfloat16": lambda m, x: m.bfloat16(),
    "double": lambda m, x: m.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_seen_at_the_next_forward(change: str) -> None:
    eager, fused, _, x = pair("resnet18")
    eager.eval(), fused.eval()
    with torch.no_grad():
        before = fused(x)  # fills the cache
    for model in (eager, fused):
        with torch.set_grad_enabled(change == "optimizer step"):
            CHANGES[change](model, x)
    x = x.to(next(fused.parameters()).dtype)
    with torch.no_grad():
        after, expected = fused(x), eager(x)
    assert after.dtype == expected.dtype
    tolerance = 0.1 if change == "bfloat16" else 1e-3
    assert relative(after, expected.double()) < tolerance
    if change not in ("bfloat16", "double"):
        assert not torch.allclose(after, before, rtol=1e-4)


def test_train_and_eval_toggle() -> None:
    eager, fused, _, x = pair("resnet18")
    x = torch.randn(8, 3, 64, 64, device=DEVICE)
    with torch.no_grad():
        for mode in (True, False, True, True, False):
            torch.testing.assert_close(fused.train(mode)(x), eager.train(mode)(x), rtol=2e-3, atol=2e-3)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_frozen_batch_norm_keeps_its_statistics_and_gives_gradients() -> None:
    eager, fused, _, x = pair("resnet18")
    x = torch.randn(4, 3, 64, 64, device=DEVICE)
    for model in (eager, fused):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.weight.requires_grad_(False)
        model(x).square().mean().backward()
    for (key, p), q in zip(eager.named_parameters(), fused.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None:
            assert relative(q.grad, p.grad.double()) < 1e-3, key
    assert all(torch.equal(eager.state_dict()[k], v) for k, v in fused.state_dict().items() if "running" in k)


def test_sync_batch_norm_conversion_keeps_the_activation() -> None:
    eager, fused, _, x = pair("resnet18")
    for model in (eager, fused):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), eager(x))


def test_an_inner_hook_is_called_after_fusing_and_prevents_fusing_before() -> None:
    _, fused, _, x = pair("resnet18")
    fused.eval()
    seen: list[str] = []
    with torch.no_grad():
        expected = fused(x)
        handle = fused.layer1[0].conv2.register_forward_hook(lambda *a: seen.append("conv2"))
        torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4)
    assert seen == ["conv2"]
    handle.remove()

    model = tv("resnet18")
    model.layer1[0].bn1.register_forward_hook(lambda *a: None)
    report = fuse_(model)
    assert [(e.name, e.reason) for e in report.skipped] == [("layer1.0", "bn1 has hooks")]


def test_a_hook_on_the_block_itself_survives() -> None:
    model = lively(tv("resnet18")).eval()
    seen: list[tuple[int, ...]] = []
    handle = model.layer1[0].register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape)))
    fuse_(model)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32, device=DEVICE))
        assert seen == [(1, 64, 8, 8)]
        handle.remove()
        model(torch.randn(1, 3, 32, 32, device=DEVICE))
    assert len(seen) == 1


class Doubled(torchvision.models.resnet.BasicBlock):
    """A subclass whose forward differs: fusing it as its parent would change the numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_is_not_understood_is_left_alone_and_named() -> None:
    model = torchvision.models.resnet.ResNet(Doubled, [1, 1, 1, 1])
    report = fuse_(model)
    assert {e.name for e in report.skipped} == {"layer1.0", "layer2.0", "layer3.0", "layer4.0"}
    assert all("subclass of BasicBlock" in e.reason for e in report.skipped)

    reasons = {name: fuse_(timm.create_model(name)).skipped[0].reason for name in ("seresnet50", "resnetblur50")}
    assert "se" in reasons["seresnet50"] and "aa" in reasons["resnetblur50"]
    assert "drop_path" in fuse_(timm.create_model("resnet18", drop_path_rate=0.1)).skipped[-1].reason
    assert "SiLU" in fuse_(timm.create_model("resnet18", act_layer="silu")).skipped[0].reason


@pytest.mark.parametrize("name", ["seresnet50", "resnetblur50", "resnet50d"])
def test_partly_fused_models_give_the_same_numbers(name: str) -> None:
    torch.manual_seed(0)
    eager = lively(timm.create_model(name)).eval()
    fused = copy.deepcopy(eager)
    fuse_(fused)
    x = torch.randn(1, 3, 64, 64, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), eager(x), rtol=1e-3, atol=1e-3)


class LeakyConv(nn.Module):
    """Looks like BasicConv2d and is not."""

    def __init__(self, inputs: int, outputs: int, **options: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, bias=False, **options)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.bn(self.conv(x)), 0.2)


def googlenet_block(**options: object) -> nn.Module:
    block = googlenet.Inception
    return lively(nn.Sequential(block(16, 8, 6, 10, 3, 5, 7, **options))).eval()


def test_an_inception_block_that_differs_in_any_way_keeps_its_numbers() -> None:
    leaky, dilated, averaging, strided = (googlenet_block(**o) for o in ({"conv_block": LeakyConv}, {}, {}, {}))
    dilated[0].branch2[1].conv.dilation = dilated[0].branch2[1].conv.padding = (2, 2)
    averaging[0].branch4[0] = nn.AvgPool2d(3, 1, 1)
    strided[0].branch4[0].dilation, strided[0].branch4[0].kernel_size = 2, 2
    strided[0].branch4[0].padding = 1
    x = torch.randn(2, 16, 9, 9, device=DEVICE)
    for model in (leaky, dilated, averaging, strided):
        with torch.no_grad():
            expected = model(x)
            fuse_(model)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert fuse_(googlenet_block(conv_block=LeakyConv)).skipped[0].reason == "branch1 holds LeakyConv, not ConvBNReLU"
    changed = googlenet_block()
    fuse_(changed)
    with torch.no_grad():
        changed(x)
        changed[0].branch4[0] = nn.AvgPool2d(3, 1, 1)
        mine = changed(x)
        torch.testing.assert_close(mine, unfuse_(changed)(x), rtol=1e-4, atol=1e-4)


def test_a_replaced_module_eps_or_backend_is_seen() -> None:
    block = lively(fused_cnn.nn.ConvBNReLU(16, 8, 3)).eval()
    x = torch.randn(2, 16, 9, 9, device=DEVICE)

    def check() -> None:
        expected = torch.relu(block.bn(block.conv(x)))
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        check()
        block.bn = lively(nn.BatchNorm2d(8)).eval()
        block.bn.weight.fill_(5.0)
        check()
        block.bn.eps = 10.0
        check()
        block.conv = nn.Conv2d(16, 8, 3).to(DEVICE)
        check()
        block = fused_cnn.nn.ConvBNReLU(16, 8, 3).eval()
        block.backend = "none"
        with pytest.raises(ValueError, match="backend must be one of"):
            block(x)


def padded(*blocks: nn.Module) -> nn.Module:
    """With a shortcut that is neither the input nor a convolution: it stays in float32 under autocast."""
    blocks[0].downsample = nn.Sequential(nn.AvgPool2d(1))
    return nn.Sequential(*blocks)


ADDING = {
    "basic": lambda: torchvision.models.resnet.BasicBlock(16, 16),
    "bottleneck": lambda: torchvision.models.resnet.Bottleneck(16, 4),
    "in groups": lambda: torchvision.models.resnet.Bottleneck(16, 4, groups=2),
    "stage": lambda: nn.Sequential(*(torchvision.models.resnet.BasicBlock(16, 16) for _ in range(2))),
    "another shortcut": lambda: padded(torchvision.models.resnet.BasicBlock(16, 16)),
    "timm basic": lambda: timm.models.resnet.BasicBlock(16, 16),
}


@pytest.mark.parametrize("mode", ["eval", "compiled", "eval with gradients", "train"])
@pytest.mark.parametrize("name", ADDING)
def test_under_autocast_a_sum_has_the_convolutions_dtype(name: str, mode: str) -> None:
    """The foreign blocks write `out += identity`; float64 is left alone."""
    theirs = lively(ADDING[name]()).train(mode == "train")
    mine = copy.deepcopy(theirs)
    assert fuse_(mine).fused
    call = mine
    if mode == "compiled":
        torch._dynamo.reset()
        call = torch.compile(mine, backend="eager", fullgraph=True)
    x = torch.randn(4, 16, 9, 9, device=DEVICE)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        given = torch.float64 if dtype == torch.float64 else torch.float32
        theirs.to(given), mine.to(given)
        autocast = torch.bfloat16 if dtype == torch.float64 else dtype
        with torch.autocast(DEVICE, autocast), torch.set_grad_enabled("gradients" in mode or mode == "train"):
            actual, expected = call(x.to(given)), theirs(x.to(given))
        assert actual.dtype == expected.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("train", [False, True])
def test_under_autocast_own_blocks_give_one_dtype_fused_or_not(train: bool) -> None:
    block = lively(fused_cnn.nn.BasicBlock(16, 16)).train(train)
    x = torch.randn(4, 16, 9, 9, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16), torch.set_grad_enabled(train):
        results = block(x), unfuse_(block)(x)
    assert [y.dtype for y in results] == [torch.bfloat16] * 2
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


def projected(inplanes: int, planes: int) -> nn.Module:
    shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, 2, bias=False), nn.BatchNorm2d(planes))
    return torchvision.models.resnet.BasicBlock(inplanes, planes, 2, shortcut)


LYING: dict[str, Callable[[], nn.Module]] = {
    **ADDING,
    "projected": lambda: projected(16, 8),
    "projected stage": lambda: nn.Sequential(projected(16, 8), torchvision.models.resnet.BasicBlock(8, 8)),
    "convolution": lambda: googlenet.BasicConv2d(16, 24, kernel_size=3),
    "pointwise": lambda: googlenet.BasicConv2d(16, 24, kernel_size=1),
    "of one channel": lambda: googlenet.BasicConv2d(1, 24, kernel_size=3),
    "pointwise of one channel": lambda: googlenet.BasicConv2d(1, 24, kernel_size=1),
    "inception": lambda: googlenet.Inception(16, 8, 6, 10, 3, 5, 7),
    "inception without norm": lambda: fused_cnn.nn.Inception(
        16, 8, 6, 10, 3, 5, 7, norm=False, bias=True, backend="reference"
    ),
    "without norm": lambda: fused_cnn.nn.ConvBNReLU(16, 8, 3, norm=False, bias=True, backend="reference"),
}
WEIGHTS: dict[str, slice] = {
    "channels_last": slice(None),
    "one channels_last": slice(1),
    "all but one channels_last": slice(1, None),
    "contiguous": slice(0),
}


@pytest.mark.parametrize("mode", ["eval", "traced", "eval with gradients", "train"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", LYING)
def test_a_result_lies_as_eagers_does(name: str, weights: str, mode: str) -> None:
    """PyTorch's convolution gives channels_last where its input or its weight is, and a concatenation is where all
    branches are."""
    eager = LYING[name]().to(DEVICE).train(mode == "train")
    convs = [m for m in eager.modules() if isinstance(m, nn.Conv2d)]
    for conv in convs[WEIGHTS[weights]]:
        conv.to(memory_format=torch.channels_last)
    fused = copy.deepcopy(eager)
    assert fuse_(fused).fused
    x = torch.randn(2, convs[0].in_channels, 9, 9, device=DEVICE)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=memory_format)
        with torch.set_grad_enabled(mode in ("eval with gradients", "train")):
            mine = make_fx(fused)(given)(given) if mode == "traced" else fused(given)
            theirs = eager(given)
        assert mine.stride() == theirs.stride()
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_features_of_contiguous_images_can_be_viewed_as_eagers() -> None:
    eager, fused, _, x = pair("timm resnet18")
    with torch.no_grad():
        rows = [
            m.eval().forward_features(x.contiguous()).permute(0, 2, 3, 1).view(-1, m.num_features)
            for m in (fused, eager)
        ]
    torch.testing.assert_close(*rows, rtol=1e-3, atol=1e-4)


def test_pools_keep_taking_what_pytorch_takes_and_backward_hooks_fire() -> None:
    model = nn.Sequential(nn.MaxPool2d(2))
    hits: list[str] = []
    model[0].register_full_backward_hook(lambda *a: hits.append("pool"))
    # CUDA has no pool of integers.
    inputs = [torch.arange(64.0, device=DEVICE).view(1, 8, 8), torch.arange(64).view(1, 1, 8, 8)]
    expected = [model(x) for x in inputs]
    fuse_(model)
    assert all(torch.equal(model(x), out) for x, out in zip(inputs, expected, strict=True))
    model(torch.randn(1, 3, 8, 8, device=DEVICE, requires_grad=True)).sum().backward()
    assert hits == ["pool"]


def test_filter_strict_and_bad_backends() -> None:
    model = tv("resnet18")
    report = fuse_(model, filter_fn=lambda name, module: name.startswith("layer1"))
    assert {e.name for e in report.fused} == {"layer1.0", "layer1.1"}
    assert all(e.reason == "left out by filter_fn" for e in report.skipped)
    with pytest.raises(ValueError, match="nothing in Linear could be fused"):
        fuse_(nn.Linear(3, 3), strict=True)
    with pytest.raises(ValueError, match="backend must be one of reference, native, triton"):
        fuse_(model, backend="cudnn")
    text = str(report)
    assert "2 fused" in text and "layer1.0" in text and "left out by filter_fn" in text


MADE_BY_TYPE = {
    "block": ("resnet18", lambda m: type(m.layer1[0])(64, 64)),
    "block with options": ("resnet50", lambda m: type(m.layer1[1])(64, 16, norm_layer=nn.BatchNorm2d, dilation=2)),
    "timm block": ("timm resnet18", lambda m: type(m.layer1[0])(64, 64, act_layer=nn.ReLU)),
    "projected": ("resnet18", lambda m: (setattr(m, "inplanes", 64), m._make_layer(type(m.layer2[0]), 32, 2, 2))[1]),
    "convolution": ("googlenet", lambda m: type(m.conv1)(64, 8, kernel_size=1)),
    "inception": ("googlenet", lambda m: type(m.inception3a)(64, 8, 4, 8, 4, 8, 8)),
    "pool": ("googlenet", lambda m: type(m.maxpool1)(3, stride=2, ceil_mode=True)),
    "stage": ("resnet18", lambda m: type(m.layer1)(*m.layer1)),
    "half a stage": ("resnet18", lambda m: m.layer1[:1]),
}


@pytest.mark.parametrize("kind", MADE_BY_TYPE)
def test_a_fused_blocks_class_makes_blocks_as_the_foreign_one_does(kind: str) -> None:
    name, make = MADE_BY_TYPE[kind]
    eager, fused, _, _ = pair(name)
    theirs, mine = (lively(make(model)).eval() for model in (eager, fused))
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 64, 9, 9, device=DEVICE)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(mine(x), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(copy.deepcopy(mine)(x), expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(unfuse_(mine)(x), expected) and type(mine) is type(theirs)


def test_a_fused_networks_class_makes_networks_as_the_foreign_one_does() -> None:
    eager, fused, _, x = pair("resnet18")
    theirs, mine = (lively(type(m)(type(m.layer1[0]), [1, 1, 1, 1], num_classes=7)).eval() for m in (eager, fused))
    mine.load_state_dict(theirs.state_dict())
    assert inspect.signature(type(fused)) == inspect.signature(type(eager))
    with torch.no_grad():
        torch.testing.assert_close(mine(x), theirs(x), rtol=1e-3, atol=1e-4)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'planes'"):
        type(fused.layer1[0])(64)


@pytest.mark.parametrize("part, keyword", [("layer1", "input"), ("maxpool", "input"), ("layer1.0", "x")])
def test_the_input_is_taken_by_the_name_that_the_foreign_block_gives_it(part: str, keyword: str) -> None:
    eager, fused, _, _ = pair("resnet18")
    theirs, mine = (model.eval().get_submodule(part) for model in (eager, fused))
    x = torch.randn(2, 64, 9, 9, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(mine(**{keyword: x}), theirs(**{keyword: x}), rtol=1e-3, atol=1e-4)
    for module in (mine, theirs):
        with pytest.raises(TypeError, match="unexpected keyword argument 'picture'"):
            module(picture=x)


@pytest.mark.parametrize("function", [fuse_, unfuse_, fused_cnn.refresh])
@pytest.mark.parametrize(
    "model, got",
    [
        ("resnet18", "a str"),
        (None, "a NoneType"),
        ([nn.ReLU()], "a list"),
        (torch.ones(1), "a Tensor"),
        (torchvision.models.ResNet, "the class ResNet"),
    ],
    ids=["str", "None", "list", "Tensor", "class"],
)
def test_what_is_not_a_module_is_refused(function: Callable[[object], object], model: object, got: str) -> None:
    with pytest.raises(TypeError, match=f"^{function.__name__}: model must be an nn.Module, got {got}$"):
        function(model)


def test_a_filter_that_cannot_be_called_is_refused_before_anything_changes() -> None:
    model = tv("resnet18")
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match="filter_fn must be a function of a block's name and module, got 3"):
        fuse_(model, filter_fn=3)  # type: ignore[arg-type]
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize(
    "use",
    [list, len, lambda report: report[0], lambda report: report(1)],
    ids=["iterated", "counted", "indexed", "called"],
)
def test_a_report_that_is_taken_for_the_model_says_so(use: Callable[[FusionReport], object]) -> None:
    report = fuse_(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="fuse_ changes the model in place and returns a report"):
        use(report)
    assert report and report == copy.deepcopy(report)


def test_fusing_twice_changes_nothing() -> None:
    _, fused, first, _ = pair("resnet18")
    second = fuse_(fused)
    assert first.fused and not second.fused and not second.skipped


def test_a_block_used_twice_stays_one_block() -> None:
    block = torchvision.models.resnet.BasicBlock(8, 8)
    model = nn.Sequential(block, block)
    fuse_(model)
    assert model[0] is model[1] and len(list(model.parameters())) == len(list(block.parameters()))


def test_own_models_switch_between_eager_and_fused() -> None:
    model = lively(own_models.resnet18(backend="reference")).eval()
    x = torch.randn(1, 3, 64, 64, device=DEVICE)
    with torch.no_grad():
        expected = model(x)
        report = fuse_(model)
        assert len(report.fused) == 10
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
        unfuse_(model)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["googlenet", "resnet18"])
def test_compiles_whole_in_eval_and_exports(name: str) -> None:
    _, fused, _, x = pair(name)
    fused.eval()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = logits(fused(x))
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(logits(compiled(x)), expected, rtol=1e-3, atol=1e-4)
        exported = torch.export.export(fused, (x,)).module()
        torch.testing.assert_close(logits(exported(x)), expected, rtol=1e-3, atol=1e-4)


def test_compiles_whole_in_training() -> None:
    torch._dynamo.reset()
    eager, fused, _, _ = pair("resnet18")
    x = torch.randn(4, 3, 64, 64, device=DEVICE)
    compiled = torch.compile(fused.train(), fullgraph=True, backend="aot_eager")
    eager.train()(x).square().mean().backward()
    compiled(x).square().mean().backward()
    for (key, p), q in zip(eager.named_parameters(), fused.parameters(), strict=True):
        assert relative(q.grad, p.grad.double()) < 2e-2, key
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["googlenet", "resnet18"])
@pytest.mark.parametrize("train", [False, True])
def test_autocast_gives_bfloat16_logits_as_close_as_eagers(name: str, train: bool) -> None:
    eager, fused, _, _ = pair(name)
    x = torch.randn(8, 3, 64, 64, device=DEVICE)
    eager.train(train), fused.train(train)
    truth = logits(copy.deepcopy(eager).double()(x.double()))
    with torch.autocast(DEVICE, torch.bfloat16), torch.set_grad_enabled(train):
        mine, theirs = logits(fused(x)), logits(eager(x))
    assert mine.dtype == theirs.dtype
    assert relative(mine, truth) <= 2 * relative(theirs, truth) + 0.01


def test_checkpointing_updates_statistics_as_eager_does() -> None:
    from torch.utils.checkpoint import checkpoint

    eager, fused, _, _ = pair("resnet18")
    x = torch.randn(4, 64, 16, 16, device=DEVICE, requires_grad=True)
    for model in (eager, fused):
        model.train()
        checkpoint(model.layer1, x, use_reentrant=False).sum().backward()
    for key, value in eager.layer1.state_dict().items():
        torch.testing.assert_close(fused.layer1.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_inference_mode_and_channels_first_input() -> None:
    eager, fused, _, x = pair("googlenet")
    eager.eval(), fused.eval()
    with torch.inference_mode():
        torch.testing.assert_close(fused(x.contiguous()), eager(x.contiguous()), rtol=1e-3, atol=1e-5)


def test_fusing_saves_fewer_bytes_for_backward() -> None:
    from fused_cnn.analysis import saved_bytes

    for name in ("googlenet", "resnet50"):
        eager, fused, _, _ = pair(name)
        x = torch.randn(2, 3, 64, 64, device=DEVICE).contiguous(memory_format=torch.channels_last)
        before, after = (saved_bytes(lambda m=m, x=x: logits(m.train()(x)).sum()) for m in (eager, fused))
        assert after < before, (name, before, after)
