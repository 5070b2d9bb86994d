"""Nothing that a user does to a model is skipped by its fused blocks, or breaks them.

Every story is told twice, of a fused model and of an eager one: fuse_ before or after the change, calls around it, and
the change undone. The outputs, the gradients, the state and what the user's own hooks saw must agree.
"""

import copy
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import DEVICE
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, parametrize, prune

import fused_cnn
from fused_cnn import fuse_, refresh, unfuse_
from fused_cnn.nn import FusedModule

Log = list[tuple[str, Any]]
Undo = Callable[[], None]
Change = Callable[[nn.Module, Log], Undo | None]

# Folding rounds the weights once more, and sums are taken in another order: some units in float32's last place for each
# of the dozen layers. What a skipped change does is a thousand times as large, which `tell` asks of every change.
CLOSE = 1e-4
# A ReLU whose input is zero but for rounding may pass a gradient in one arithmetic and not in the other: one of the
# thousands of elements.
GRADIENTS_CLOSE = 1e-2


def narrow(model: nn.Module, block: Callable[..., nn.Module]) -> nn.Module:
    """A ResNet with two stages of few channels, which show as much as four."""
    projection = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    model.conv1, model.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
    model.layer1 = nn.Sequential(block(16, 16), block(16, 16))
    model.layer2 = nn.Sequential(block(16, 32, 2, projection))
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(32, 10)
    return model


def resnet_of_torchvision() -> nn.Module:
    block = torchvision.models.resnet.BasicBlock
    return narrow(torchvision.models.resnet.ResNet(block, [1, 1, 1, 1]), block)


def resnet_of_timm() -> nn.Module:
    block = timm.models.resnet.BasicBlock
    return narrow(timm.models.resnet.ResNet(block, [1, 1, 1, 1]), block)


def bottlenecks() -> nn.Module:
    block = torchvision.models.resnet.Bottleneck
    return nn.Sequential(nn.Conv2d(3, 32, 3, 4, 1), nn.Sequential(block(32, 8), block(32, 8)))


def inceptions() -> nn.Module:
    block = importlib.import_module("torchvision.models.googlenet").Inception
    return nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), block(16, 8, 6, 10, 3, 5, 7), block(30, 8, 8, 8, 4, 4, 4))


def own_blocks() -> nn.Module:
    plain: dict[str, Any] = {"backend": "reference"}
    projection = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    blocks = fused_cnn.nn.BasicBlock(16, 32, 2, projection, **plain), fused_cnn.nn.BasicBlock(32, 32, **plain)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), fused_cnn.nn.ResidualStage(*blocks, **plain))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": resnet_of_torchvision,
    "timm": resnet_of_timm,
    "bottleneck": bottlenecks,
    "inception": inceptions,
    "own": own_blocks,
}
# Where each kind of module stands in each model.
PARTS: dict[str, dict[str, str]] = {
    "torchvision": {
        "network": "",
        "stem conv": "conv1",
        "stem bn": "bn1",
        "stem relu": "relu",
        "pool": "maxpool",
        "stage": "layer1",
        "block": "layer1.1",
        "conv": "layer1.0.conv1",
        "bn": "layer1.1.bn2",
        "relu": "layer1.0.relu",
        "projection": "layer2.0.downsample",
        "projection conv": "layer2.0.downsample.0",
        "projection bn": "layer2.0.downsample.1",
    },
    "timm": {
        "network": "",
        "stem conv": "conv1",
        "stem bn": "bn1",
        "stem relu": "act1",
        "pool": "maxpool",
        "stage": "layer1",
        "block": "layer1.1",
        "conv": "layer1.1.conv1",
        "bn": "layer1.0.bn1",
        "relu": "layer1.1.act1",
        "last relu": "layer1.1.act2",
        "identity": "layer1.1.aa",
        "drop block": "layer2.0.drop_block",
        "projection": "layer2.0.downsample",
        "projection conv": "layer2.0.downsample.0",
    },
    "bottleneck": {"stage": "1", "block": "1.1", "conv": "1.0.conv2", "bn": "1.0.bn3", "relu": "1.1.relu"},
    "own": {
        "stage": "1",
        "block": "1.1",
        "conv": "1.0.conv2",
        "bn": "1.1.bn1",
        "relu": "1.1.relu",
        "projection": "1.0.downsample",
    },
    "inception": {
        "block": "1",
        "branch": "1.branch2",
        "unit": "1.branch2.1",
        "conv": "1.branch3.0.conv",
        "bn": "1.branch1.bn",
        "pool": "1.branch4.0",
    },
}
each_model = pytest.mark.parametrize("name", MODELS)
each_part = pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in PARTS.items() for part in parts])
each_moment = pytest.mark.parametrize("when", ["before", "after"])
# Training shows little that eval has not shown before fuse_.
each_moment_and_mode = pytest.mark.parametrize(
    ("when", "train"), [("before", False), ("after", False), ("after", True)]
)


@functools.cache
def _template(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics of which each shows in the result
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.6, 1.4),
                (module.bias, -0.3, 0.3),
            ):
                nn.init.uniform_(tensor, low, high)  # type: ignore[arg-type]
    return model.to(DEVICE)


def new(name: str) -> nn.Module:
    """A model of its own, always the same."""
    return copy.deepcopy(_template(name)).eval()


def images(number: int = 6) -> Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def part_of(model: nn.Module, name: str, part: str) -> Any:
    return model.get_submodule(PARTS[name][part])


def distance(a: Tensor, b: Tensor, least: float = 1e-30) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype, f"{a.shape}, {a.dtype} and {b.shape}, {b.dtype}"
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(least)).item()


def assert_close(mine: Any, theirs: Any, bound: float = CLOSE, where: str = "", least: float = 1e-30) -> None:
    """The same tree of lists, dictionaries, tensors and whatever compares. What is smaller than `least` is nothing but
    rounding."""
    if isinstance(theirs, Tensor):
        assert isinstance(mine, Tensor), where
        error = distance(mine, theirs, least)
        assert error <= bound, f"{where}: {error:.2g}"
    elif isinstance(theirs, dict):
        assert list(mine) == list(theirs), where
        for key in theirs:
            assert_close(mine[key], theirs[key], bound, f"{where}.{key}", least)
    elif isinstance(theirs, (list, tuple)):
        assert len(mine) == len(theirs), f"{where}: {len(mine)} and {len(theirs)}"
        for i, pair in enumerate(zip(mine, theirs, strict=True)):
            assert_close(*pair, bound, f"{where}[{i}]", least)
    else:
        assert mine == theirs, where


@dataclass
class Told:
    """What came of a story."""

    log: Log = field(default_factory=list)  # what the user's hooks saw
    outs: list[Tensor] = field(default_factory=list)
    grads: list[dict[str, Tensor]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    model: Any = None


def call(model: nn.Module, told: Told, train: bool) -> None:
    x = images()
    if not train:
        with torch.no_grad():
            told.outs.append(model(x).clone())
        return
    x.requires_grad_()
    model.zero_grad(set_to_none=True)
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
    told.outs.append(out.detach())
    told.grads.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
    told.grads[-1]["x"] = x.grad  # type: ignore[assignment]


def tell(name: str, change: Change, when: str, *, fused: bool, train: bool = False) -> Told:
    """A change before or after fuse_, two calls, and two more with the change undone where it can be."""
    model, told = new(name).train(train), Told()
    if fused and when == "before":
        undo = change(model, told.log)
        fuse_(model)
    else:
        if fused:
            assert fuse_(model).fused
        if when == "after":
            call(model, Told(), train)
            call(model, Told(), train)
        undo = change(model, told.log)
    try:
        call(model, told, train)
        call(model, told, train)
    finally:
        if undo is not None:
            undo()
    if undo is not None:
        call(model, told, train)
        call(model, told, train)
    told.state, told.model = dict(model.state_dict()), model
    return told


def assert_told_alike(name: str, change: Change, when: str, *, train: bool = False, shows: bool = True) -> None:
    """The story of the fused model is the eager one's. With `shows` the change must make a difference that would be
    missed."""
    theirs = tell(name, change, when, fused=False, train=train)
    if shows and not theirs.log:
        unchanged = tell(name, lambda model, log: None, when, fused=False, train=train)
        bound, seen = (
            10 * CLOSE,
            [
                *zip(theirs.outs, unchanged.outs, strict=False),
                *((theirs.grads[0][k], unchanged.grads[0][k]) for k in (["x"] if train else [])),
            ],
        )
        assert any(a.shape != b.shape or not distance(a, b) <= bound for a, b in seen), "the change shows nowhere"
    mine = tell(name, change, when, fused=True, train=train)
    assert_close(mine.outs, theirs.outs, where="outs")
    assert_close([label for label, _ in mine.log], [label for label, _ in theirs.log], where="log")
    assert_close([v for _, v in mine.log], [v for _, v in theirs.log], GRADIENTS_CLOSE if train else CLOSE, "log")
    for i, (ours, yours) in enumerate(zip(mine.grads, theirs.grads, strict=True)):
        assert_gradients_close(ours, yours, f"grads[{i}]")
    assert_close(mine.state, theirs.state, where="state")


def assert_gradients_close(mine: dict[str, Tensor], theirs: dict[str, Tensor], where: str = "") -> None:
    """A bias before BatchNorm has a gradient of nothing but rounding, and counts by the size of the others'."""
    largest = max((g.double().norm().item() for g in theirs.values()), default=0.0)
    assert_close(mine, theirs, GRADIENTS_CLOSE, where, least=1e-3 * largest)


def first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def without_in_place(model: nn.Module) -> None:
    """Backward hooks forbid what works in place on what they hand out."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False


def note(log: Log, label: str, value: Any) -> None:
    log.append((label, first(value).detach().clone()))


def removing(*handles: Any) -> Undo:
    return lambda: [handle.remove() for handle in handles] and None


def observing(m: nn.Module, log: Log) -> Undo:
    return removing(
        m.register_forward_hook(lambda m, i, out: note(log, "out", out)),
        m.register_forward_hook(lambda m, i, kwargs, out: note(log, f"out, {kwargs}", out), with_kwargs=True),
        m.register_forward_hook(lambda m, i, out: note(log, "out, always", out), always_call=True),
        m.register_forward_pre_hook(lambda m, i: note(log, "in", i)),
        m.register_forward_pre_hook(lambda m, i, kwargs: note(log, f"in, {kwargs}", i), with_kwargs=True),
    )


def observing_backward(m: nn.Module, log: Log) -> Undo:
    return removing(
        m.register_full_backward_hook(lambda m, i, out: note(log, "grad", out)),
        m.register_full_backward_pre_hook(lambda m, out: note(log, "grad, before", out)),
    )


HOOKS: dict[str, Callable[[nn.Module, Log], Undo]] = {
    "observing": observing,
    "changing outputs": lambda m, log: removing(m.register_forward_hook(lambda m, i, out: F.hardtanh(out, -0.3, 0.3))),
    "changing inputs": lambda m, log: removing(
        m.register_forward_pre_hook(lambda m, i, kwargs: ((F.hardtanh(i[0], -0.3, 0.3),), kwargs), with_kwargs=True)
    ),
}
BACKWARD_HOOKS: dict[str, Callable[[nn.Module, Log], Undo]] = {
    "observing": observing_backward,
    "changing gradients": lambda m, log: removing(
        m.register_full_backward_pre_hook(lambda m, out: tuple(g.clamp_min(0.0) for g in out))
    ),
}


@each_moment
@pytest.mark.parametrize("hook", HOOKS)
@each_part
def test_forward_hooks_are_called(name: str, part: str, hook: str, when: str) -> None:
    def change(model: nn.Module, log: Log) -> Undo:
        return HOOKS[hook](part_of(model, name, part), log)

    assert_told_alike(name, change, when)


@each_moment
@pytest.mark.parametrize("hook", BACKWARD_HOOKS)
@each_part
def test_backward_hooks_are_called(name: str, part: str, hook: str, when: str) -> None:
    if part == "bn" and name not in ("timm", "own"):
        pytest.skip("torchvision's blocks work in place on what such a hook hands out")

    def change(model: nn.Module, log: Log) -> Undo:
        without_in_place(model)
        return BACKWARD_HOOKS[hook](part_of(model, name, part), log)

    assert_told_alike(name, change, when, train=True)


@each_moment_and_mode
@each_model
def test_guided_backprop_changes_every_relus_gradient(name: str, train: bool, when: str) -> None:
    def change(model: nn.Module, log: Log) -> Undo:
        without_in_place(model)
        relus = [m for m in model.modules() if isinstance(m, nn.ReLU)]
        handles = [m.register_full_backward_hook(lambda m, i, out: (i[0].clamp_min(0.0),)) for m in relus]
        return removing(*handles)

    if name == "inception":
        pytest.skip("its ReLUs are no modules")

    def saliency(fused: bool) -> Tensor:
        model, x = new(name).train(train), images().requires_grad_()
        if fused and when == "after":
            fuse_(model)
            model(x.detach())
        change(model, [])
        if fused and when == "before":
            fuse_(model)
        model(x).square().sum().backward()
        return x.grad  # type: ignore[return-value]

    assert_close(saliency(True), saliency(False), GRADIENTS_CLOSE)


@each_moment
@each_model
def test_activation_statistics_see_every_module(name: str, when: str) -> None:
    """As quantisation and pruning tools do: a hook on each leaf."""

    def change(model: nn.Module, log: Log) -> Undo:
        leaves = [(k, m) for k, m in model.named_modules() if not list(m.children())]
        handles = [m.register_forward_hook(lambda m, i, out, k=k: note(log, k, out)) for k, m in leaves]
        return removing(*handles)

    assert_told_alike(name, change, when)


GLOBAL_HOOKS: dict[str, Callable[[Log], Any]] = {
    "forward": lambda log: nn_module.register_module_forward_hook(
        lambda m, i, out: note(log, type(m).__name__.removeprefix("Fused"), out)
    ),
    "forward that replaces": lambda log: nn_module.register_module_forward_hook(
        lambda m, i, out: out * 0.5 if isinstance(m, nn.Conv2d) else None
    ),
    "pre": lambda log: nn_module.register_module_forward_pre_hook(
        lambda m, i: note(log, type(m).__name__.removeprefix("Fused"), i)
    ),
    "full backward": lambda log: nn_module.register_module_full_backward_hook(
        lambda m, i, out: note(log, type(m).__name__.removeprefix("Fused"), out)
    ),
    "full backward pre": lambda log: nn_module.register_module_full_backward_pre_hook(
        lambda m, out: note(log, type(m).__name__.removeprefix("Fused"), out)
    ),
}


@each_moment
@pytest.mark.parametrize("hook", GLOBAL_HOOKS)
@each_model
def test_everybodys_hooks_are_called_for_every_module(name: str, hook: str, when: str) -> None:
    def change(model: nn.Module, log: Log) -> Undo:
        if "backward" in hook:
            without_in_place(model)
        return GLOBAL_HOOKS[hook](log).remove

    if name != "own" and "backward" in hook:
        pytest.skip("torchvision's and timm's blocks work in place on what such a hook hands out")
    assert_told_alike(name, change, when, train="backward" in hook)


@contextmanager
def setting(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    """An attribute, for a while; then it is as it was, or away again."""
    had, before = attribute in vars(owner), vars(owner).get(attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, attribute, before)
        else:
            delattr(owner, attribute)


def set_until_undone(owner: Any, attribute: str, value: Any) -> Undo:
    context = setting(owner, attribute, value)
    context.__enter__()
    return lambda: context.__exit__(None, None, None) and None


@each_moment_and_mode
@each_part
def test_a_forward_set_on_a_module_runs(name: str, part: str, train: bool, when: str) -> None:
    """As accelerate, profilers and patches do: the old forward, wrapped."""

    def change(model: nn.Module, log: Log) -> Undo:
        module = part_of(model, name, part)
        old = module.forward

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            note(log, "in", args)
            return F.hardtanh(module._old_forward(*args, **kwargs), -0.5, 0.5)

        module._old_forward = old
        undo = set_until_undone(module, "forward", functools.update_wrapper(functools.partial(forward, module), old))

        def remove() -> None:
            undo()
            del module._old_forward

        return remove

    assert_told_alike(name, change, when, train=train)


@each_moment_and_mode
@pytest.mark.parametrize("method", ["forward", "_conv_forward"])
@each_part
def test_a_method_set_on_a_class_runs(name: str, part: str, train: bool, method: str, when: str) -> None:
    kind = type(part_of(_template(name), name, part))
    if not hasattr(kind, method) or (method == "_conv_forward" and part != "conv"):
        pytest.skip(f"{kind.__name__} has no {method}, or another part shows the same")
    old = getattr(kind, method)

    def patched(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return F.hardtanh(old(self, *args, **kwargs), -0.5, 0.5)

    def change(model: nn.Module, log: Log) -> Undo:
        return set_until_undone(kind, method, patched)

    assert_told_alike(name, change, when, train=train)


@each_moment
@each_model
def test_a_conv_forward_set_on_a_convolution_runs(name: str, when: str) -> None:
    def change(model: nn.Module, log: Log) -> Undo:
        conv = part_of(model, name, "conv")

        def conv_forward(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.conv2d(x, weight.relu(), bias, self.stride, self.padding, self.dilation, self.groups)

        return set_until_undone(conv, "_conv_forward", types.MethodType(conv_forward, conv))

    assert_told_alike(name, change, when)


# Weights that are made of others.
class Positive(nn.Module):
    """Not a factor, which BatchNorm would take out again in training."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.relu()

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def parametrized(module: nn.Module, log: Log) -> Undo:
    parametrize.register_parametrization(module, "weight", Positive())
    return lambda: parametrize.remove_parametrizations(module, "weight", leave_parametrized=False) and None


def weight_normed(module: nn.Module, log: Log) -> Undo:
    parametrizations.weight_norm(module)
    with torch.no_grad():
        module.parametrizations.weight.original1.relu_()  # type: ignore[index, union-attr]
    return lambda: parametrize.remove_parametrizations(module, "weight") and None


def spectrally_normed(module: nn.Module, log: Log) -> Undo:
    torch.manual_seed(0)
    parametrizations.spectral_norm(module)
    return lambda: parametrize.remove_parametrizations(module, "weight") and None


def old_weight_normed(module: nn.Module, log: Log) -> Undo:
    torch.nn.utils.weight_norm(module)
    with torch.no_grad():
        module.weight_v.relu_()  # type: ignore[operator]
    return lambda: torch.nn.utils.remove_weight_norm(module) and None


def pruned(module: nn.Module, log: Log) -> Undo:
    prune.l1_unstructured(module, "weight", amount=0.5)
    return lambda: prune.remove(module, "weight") and None


MADE_WEIGHTS: dict[str, Callable[[nn.Module, Log], Undo]] = {
    "parametrize": parametrized,
    "weight_norm": weight_normed,
    "spectral_norm": spectrally_normed,
    "weight_norm with hooks": old_weight_normed,
    "prune": pruned,
}


@each_moment_and_mode
@pytest.mark.parametrize("way", MADE_WEIGHTS)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@each_model
def test_weights_that_are_made_of_others_are_read(name: str, train: bool, way: str, when: str) -> None:
    def change(model: nn.Module, log: Log) -> Undo:
        return MADE_WEIGHTS[way](part_of(model, name, "conv"), log)

    # Under batch statistics a factor shows nowhere but in the state.
    assert_told_alike(name, change, when, train=train, shows=not (train and way == "spectral_norm"))


# Modules replaced, set and removed.
class LoRA(nn.Module):
    """A convolution with a low-rank one beside it."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        where = {"stride": base.stride, "padding": base.padding, "bias": False}
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, **where)  # type: ignore[arg-type]
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)
        self.weight = base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def replaced(part: str, make: Callable[[nn.Module], Any]) -> Callable[[str], Change]:
    """The named part, exchanged for what `make` makes of it, and put back."""

    def of(name: str) -> Change:
        def change(model: nn.Module, log: Log) -> Undo:
            parent_name, _, attribute = PARTS[name].get(part, part).rpartition(".")
            parent = model.get_submodule(parent_name)
            before = getattr(parent, attribute)
            torch.manual_seed(0)
            after = make(before)
            if isinstance(after, nn.Module) and after is not before:
                after.to(DEVICE).train(model.training)
            setattr(parent, attribute, after)
            return lambda: setattr(parent, attribute, before)

        return change

    return of


def _absent(part: nn.Module) -> None:
    return None


REPLACED: dict[str, tuple[tuple[str, ...], Callable[[str], Change]]] = {
    "relu by Identity": (("torchvision", "timm", "bottleneck"), replaced("relu", lambda m: nn.Identity())),
    "relu by SiLU": (("torchvision", "timm", "bottleneck"), replaced("relu", lambda m: nn.SiLU())),
    "relu by Hardtanh": (("torchvision", "timm"), replaced("relu", lambda m: nn.Hardtanh(0.0, 0.5))),
    "last relu by SiLU": (("timm",), replaced("last relu", lambda m: nn.SiLU())),
    "stem's relu by Identity": (("torchvision", "timm"), replaced("stem relu", lambda m: nn.Identity())),
    "bn by Identity": (("torchvision", "timm", "bottleneck", "inception"), replaced("bn", lambda m: nn.Identity())),
    "bn by GroupNorm": (
        ("torchvision", "timm", "bottleneck", "inception"),
        replaced("bn", lambda m: nn.GroupNorm(2, m.num_features)),
    ),
    "stem's bn by Identity": (("torchvision", "timm"), replaced("stem bn", lambda m: nn.Identity())),
    "conv by LoRA": (("torchvision", "timm", "bottleneck", "inception"), replaced("conv", LoRA)),
    "stem's conv by LoRA": (("torchvision", "timm"), replaced("stem conv", LoRA)),
    "conv by a conv with a bias": (
        ("torchvision", "timm", "bottleneck", "inception"),
        replaced("conv", lambda m: nn.Conv2d(m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding)),
    ),
    "pool by Identity": (("torchvision", "timm", "inception"), replaced("pool", lambda m: nn.Identity())),
    "pool by AvgPool2d": (
        ("torchvision", "timm", "inception"),
        replaced("pool", lambda m: nn.AvgPool2d(3, m.stride, 1)),
    ),
    "pool by a new MaxPool2d": (("torchvision", "timm"), replaced("pool", lambda m: nn.MaxPool2d(2, m.stride))),
    "block by Identity": (("torchvision", "timm", "bottleneck"), replaced("block", lambda m: nn.Identity())),
    "block by a new one": (("torchvision",), replaced("block", lambda m: torchvision.models.resnet.BasicBlock(16, 16))),
    "stage by Identity": (("bottleneck",), replaced("stage", lambda m: nn.Identity())),
    "stage by a conv": (("torchvision",), replaced("stage", lambda m: nn.Conv2d(16, 16, 3, padding=1))),
    "network's stage by its first block": (("torchvision", "timm"), replaced("stage", lambda m: m[0])),
    "later stage by a conv": (("torchvision",), replaced("layer3", lambda m: nn.Conv2d(32, 32, 1))),
    "projection by another": (("torchvision",), replaced("projection", lambda m: nn.Conv2d(16, 32, 1, 2))),
    "projection by AvgPool2d and conv": (
        ("torchvision",),
        replaced(
            "projection", lambda m: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32))
        ),
    ),
    "projection's conv by LoRA": (("torchvision", "timm"), replaced("projection conv", LoRA)),
    "a projection where there was none": (
        ("torchvision", "timm"),
        lambda name: replaced(f"{PARTS[name]['block']}.downsample", lambda m: nn.Conv2d(16, 16, 1))(name),
    ),
    "squeeze-and-excitation": (("timm",), replaced("layer1.1.se", lambda m: timm.layers.SEModule(16))),
    "se as a callable": (("timm",), replaced("layer1.1.se", lambda m: lambda x: torch.sigmoid(x) - 0.5)),
    "drop_path": (("timm",), replaced("layer1.1.drop_path", lambda m: nn.SiLU())),
    "drop_path as a callable": (("timm",), replaced("layer1.1.drop_path", lambda m: lambda x: 0.5 * x)),
    "drop_block": (("timm",), replaced("layer1.1.drop_block", lambda m: nn.SiLU())),
    "aa": (("timm",), replaced("layer1.1.aa", lambda m: nn.AvgPool2d(3, 1, 1))),
}


def longer(part: str) -> Callable[[str], Change]:
    def of(name: str) -> Change:
        def change(model: nn.Module, log: Log) -> Undo:
            sequence = part_of(model, name, part)
            sequence.append(nn.Sigmoid())
            return lambda: sequence.__delitem__(-1)

        return change

    return of


REPLACED["a module in the stage"] = (("torchvision", "timm", "bottleneck"), longer("stage"))
REPLACED["a module in the branch"] = (("inception",), longer("branch"))


@each_moment_and_mode
@pytest.mark.parametrize(("way", "name"), [(way, name) for way, (names, _) in REPLACED.items() for name in names])
def test_what_is_replaced_runs(way: str, name: str, train: bool, when: str) -> None:
    assert_told_alike(name, REPLACED[way][1](name), when, train=train)


# Settings and weights, changed later.
def settings_of(part: str, **settings: Any) -> Callable[[str], Change]:
    def of(name: str) -> Change:
        def change(model: nn.Module, log: Log) -> Undo:
            module = part_of(model, name, part)
            before = {key: getattr(module, key) for key in settings}
            for key, value in settings.items():
                setattr(module, key, value)
            return lambda: [setattr(module, key, value) for key, value in before.items()] and None

        return change

    return of


def training(part: str, mode: bool) -> Callable[[str], Change]:
    def of(name: str) -> Change:
        return lambda model, log: part_of(model, name, part).train(mode) and None

    return of


def without_statistics(name: str) -> Change:
    def change(model: nn.Module, log: Log) -> None:
        bn = part_of(model, name, "bn")
        bn.running_mean = bn.running_var = bn.num_batches_tracked = None

    return change


SETTINGS: dict[str, tuple[bool, Callable[[str], Change]]] = {  # with the mode in which each shows
    "eps": (False, settings_of("bn", eps=0.5)),
    "eps in training": (True, settings_of("bn", eps=0.5)),
    "dilation and padding": (False, settings_of("conv", dilation=(3, 3), padding=(3, 3))),
    "dilation and padding in training": (True, settings_of("conv", dilation=(3, 3), padding=(3, 3))),
    "padding_mode": (False, settings_of("conv", padding_mode="circular", _reversed_padding_repeated_twice=[1] * 4)),
    "padding as a name": (False, settings_of("conv", padding="same", dilation=(2, 2))),
    "momentum": (True, settings_of("bn", momentum=0.9)),
    "momentum None": (True, settings_of("bn", momentum=None)),
    "track_running_stats in training": (True, settings_of("bn", track_running_stats=False)),
    "no statistics in eval": (False, without_statistics),
    "no statistics in training": (True, without_statistics),
    "bn in training": (False, training("bn", True)),
    "bn in eval": (True, training("bn", False)),
    "bn not affine": (False, settings_of("bn", weight=None, bias=None)),
    "bn not affine in training": (True, settings_of("bn", weight=None, bias=None)),
    "reset_running_stats": (False, lambda name: lambda m, log: part_of(m, name, "bn").reset_running_stats()),
}


@each_moment
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["torchvision", "timm", "bottleneck", "own"])
def test_a_setting_changed_later_is_seen(name: str, setting: str, when: str) -> None:
    train, change = SETTINGS[setting]
    assert_told_alike(name, change(name), when, train=train, shows=setting not in SHOW_IN_STATE)


SHOW_IN_STATE = ("momentum", "momentum None", "track_running_stats in training", "no statistics in training")


def set_of_pool(name: str) -> Change:
    return settings_of("pool", kernel_size=5, padding=2)(name)


@each_moment_and_mode
@pytest.mark.parametrize("name", ["torchvision", "timm", "inception"])
def test_a_pools_window_changed_later_is_seen(name: str, train: bool, when: str) -> None:
    assert_told_alike(name, set_of_pool(name), when, train=train)


def conv_weight(model: nn.Module) -> nn.Parameter:
    """Of some convolution inside a block."""
    return next(
        m.weight for k, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) and "." in k
    )


def replace_all(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    for module in model.modules():
        for key, p in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(make(p.detach())))


def trained(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], mode: bool, steps: int = 3
) -> Callable[[nn.Module], None]:
    def train(model: nn.Module) -> None:
        was, optimizer = model.training, make(list(model.parameters()))
        model.train(mode)
        with torch.enable_grad():
            for _ in range(3):
                optimizer.zero_grad()
                for x in images().split(3):  # gradients that are accumulated
                    out = model(x)
                    (out.tanh() * torch.linspace(-1, 1, out.numel()).view_as(out).to(out.device)).sum().backward()
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.train(was)

    return train


def averaged(model: nn.Module) -> None:
    """An exponential moving average, its statistics taken anew, and copied back."""
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    ema.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02)
    ema.update_parameters(model)
    torch.optim.swa_utils.update_bn([images()], ema)
    model.load_state_dict(ema.module.state_dict())


def reinitialised(model: nn.Module) -> None:
    torch.manual_seed(5)

    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight)

    model.apply(initialise)


def swapped(model: nn.Module) -> None:
    p = conv_weight(model)
    torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 1.5))


def scaled_state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}


def synchronised_and_back(model: nn.Module) -> None:
    """To SyncBatchNorm and to BatchNorm again, whose objects are new."""
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, nn.SyncBatchNorm):
                bn = nn.BatchNorm2d(child.num_features, child.eps).to(DEVICE).train(child.training)
                bn.load_state_dict(child.state_dict())
                bn.weight.data.mul_(1.1)
                setattr(module, key, bn)


WEIGHTS: dict[str, Callable[[nn.Module], Any]] = {
    "mul_": lambda m: conv_weight(m).mul_(1.5),
    "copy_": lambda m: conv_weight(m).copy_(conv_weight(m) * 1.5),
    "out=": lambda m: torch.mul(conv_weight(m).detach(), 1.5, out=conv_weight(m).detach()),
    "index": lambda m: conv_weight(m).__setitem__(0, 0.5),
    "a view": lambda m: conv_weight(m).view(-1)[:50].fill_(0.5),
    "detach": lambda m: conv_weight(m).detach().mul_(1.5),
    "another .data": lambda m: setattr(conv_weight(m), "data", conv_weight(m).data * 1.5),
    "a new Parameter": lambda m: replace_all(m, lambda p: p * 1.1),
    "nn.init": lambda m: nn.init.constant_(conv_weight(m), 0.05),
    "foreach": lambda m: torch._foreach_mul_([p.detach() for p in m.parameters()], 1.1),
    "swap_tensors": swapped,
    "vector_to_parameters": lambda m: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(m.parameters()) * 1.1, m.parameters()
    ),
    "load_state_dict": lambda m: m.load_state_dict(scaled_state(m)),
    "load_state_dict, assign": lambda m: m.load_state_dict(scaled_state(m), assign=True),
    "apply": reinitialised,
    "EMA": averaged,
    "SyncBatchNorm and back": synchronised_and_back,
    "half and back": lambda m: m.half().float() and conv_weight(m).mul_(1.5),
    **{
        f"{kind.__name__}, {way}, {'train' if mode else 'eval'}": trained(
            lambda ps, kind=kind, way=way: kind(ps, lr=0.003, **{way: True} if way != "plain" else {}), mode
        )
        for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
        for way in ("plain", "foreach", "fused")
        for mode in (True, False)
    },
}


@each_moment
@pytest.mark.parametrize("way", WEIGHTS)
@pytest.mark.parametrize("name", ["torchvision", "timm", "inception"])
def test_weights_changed_in_ways_that_pytorch_sees_are_used(name: str, way: str, when: str) -> None:
    def change(model: nn.Module, log: Log) -> None:
        with torch.no_grad():
            WEIGHTS[way](model)

    theirs = tell(name, change, when, fused=False)
    mine = tell(name, change, when, fused=True)
    unchanged = tell(name, lambda model, log: None, when, fused=False)
    # Adam divides a gradient by its size: one of nothing but rounding moves a weight by the whole learning rate.
    bound = 2e-2 if "Adam" in way else 1e-3 if "SGD" in way else CLOSE
    assert distance(theirs.outs[0], unchanged.outs[0]) > 5 * bound, "the change shows nowhere"
    assert_close(mine.outs, theirs.outs, bound)
    # And again, when the weights have rested long enough to be folded.
    with torch.no_grad():
        for _ in range(2):
            for _ in range(18):
                mine.model(images(1))
            conv_weight(mine.model).mul_(1.3), conv_weight(theirs.model).mul_(1.3)
        assert_close(mine.model(images()), theirs.model(images()), bound)


DTYPES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "bfloat16 and back": lambda m: m.bfloat16().float(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "channels_last and back": lambda m: m.to(memory_format=torch.channels_last).to(
        memory_format=torch.contiguous_format
    ),
    "requires_grad off": lambda m: m.requires_grad_(False),
    "requires_grad off and on": lambda m: m.requires_grad_(False).requires_grad_(True),
}


@each_moment
@pytest.mark.parametrize("way", DTYPES)
@each_model
def test_conversions_keep_a_model_right(name: str, way: str, when: str) -> None:
    outs = []
    for fused in (True, False):
        model = new(name)
        for moment in ("before", "after"):
            if fused and moment == "before" and when == "after":
                fuse_(model)
                with torch.no_grad():
                    model(images()), model(images())
            if moment == "before":
                DTYPES[way](model)
            elif fused and when == "before":
                fuse_(model)
        x = images().to(next(model.parameters()).dtype)
        with torch.no_grad():
            outs.append([model(x) for _ in range(2)])
        outs[-1].append(model(x.requires_grad_()).detach())
    # Two units in the last place for each of the layers, which may each round once more or once less.
    bound = {"bfloat16": 0.06, "half": 0.01}.get(way, CLOSE)
    assert_close(outs[0], outs[1], bound)


def storage_write(weight: Tensor) -> None:
    values = torch.empty(0, dtype=weight.dtype).set_(weight.untyped_storage(), 0, (weight.numel(),))
    values[weight[0].numel() :].mul_(1.5)


# The first values stay: on a CPU a glance at them shows most of such changes (test_folded.py).
UNSEEN: dict[str, Callable[[Tensor], object]] = {
    ".data.mul_": lambda weight: weight.data[1:].mul_(1.5),
    "numpy": lambda weight: weight.numpy()[1:].__imul__(1.5),
    "dlpack": lambda weight: torch.from_dlpack(weight)[1:].mul_(1.5),
    "untyped_storage": storage_write,
}


@pytest.mark.parametrize("way", UNSEEN)
@each_model
@torch.no_grad()
def test_a_change_that_pytorch_does_not_see_is_found_and_right_behind_refresh(name: str, way: str) -> None:
    if DEVICE != "cpu" and way in ("numpy", "untyped_storage"):
        pytest.skip("writes to this machine's memory")
    eager, fused = new(name), new(name)
    fuse_(fused)
    for _ in range(2):
        before = fused(images())
    for model in (eager, fused):
        for key, module in model.named_modules():
            in_a_block = "." in key or key == PARTS[name].get("stem conv")
            if isinstance(module, nn.Conv2d) and in_a_block:
                UNSEEN[way](module.weight.detach())
    assert torch.equal(fused(images()), before), "it was seen: say so in fuse_'s description"
    assert distance(before, eager(images())) > 10 * CLOSE
    message = r"call fused_cnn.refresh\(model\)"
    with fused_cnn.detect_stale_weights(), pytest.raises(fused_cnn.StaleWeightsError, match=message):
        fused(images())
    assert refresh(fused) is fused
    with fused_cnn.detect_stale_weights():
        assert_close([fused(images()), fused(images())], [eager(images())] * 2)


@pytest.mark.parametrize("moves", [False, True])
@each_model
def test_backward_hooks_behind_folding_see_every_gradient(name: str, moves: bool) -> None:
    """Folded weights, which run without gradients alone, do not look at them."""

    def tell(fuses: bool) -> tuple[list[Tensor], Log, dict[str, Tensor]]:
        model, log = new(name), Log()
        without_in_place(model)
        if fuses:
            fuse_(model)
        outs: list[Tensor] = []
        for turn in range(8):
            if turn == 2:
                observing_backward(part_of(model, name, "conv"), log)
                if moves:
                    model.to(DEVICE)
            with torch.set_grad_enabled(turn % 2 == 1):  # of parameters: the images want none
                out = model(images())
            if turn % 2 == 1:
                out.square().mean().backward()
            outs.append(out.detach())
        return outs, log, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}

    (theirs, expected, grads), (mine, seen, ours) = tell(False), tell(True)
    assert_close(mine, theirs)
    assert len(expected) == 6 and [label for label, _ in seen] == [label for label, _ in expected]
    assert_close([v for _, v in seen], [v for _, v in expected], GRADIENTS_CLOSE)
    assert_gradients_close(ours, grads)


_pays = FusedModule._fused_pays  # the fixture in conftest.py has all inputs pay


@each_model
def test_what_a_cpu_leaves_to_pytorch_in_training_is_eagers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results, gradients and statistics."""
    monkeypatch.setattr(FusedModule, "_fused_pays", _pays)
    assert_told_alike(name, lambda model, log: None, "after", train=True, shows=False)


@each_moment
@pytest.mark.filterwarnings("ignore:.*non-full backward hook")
@pytest.mark.parametrize("name", ["torchvision", "timm", "bottleneck"])
def test_a_backward_hook_of_the_old_kind_gets_what_eager_gives_it(name: str, when: str) -> None:
    """Of the block's last operation, whose derivative it may change."""

    def change(model: nn.Module, log: Log) -> Undo:
        block = part_of(model, name, "block")
        return block.register_backward_hook(lambda module, grads, outs: (grads[0] * 2, *grads[1:])).remove

    assert_told_alike(name, change, when, train=True)


@each_moment_and_mode
@pytest.mark.parametrize(
    ("name", "part", "attribute"),
    [(name, "block", "residual") for name in ("torchvision", "timm", "bottleneck")] + [("inception", "unit", "relu")],
)
def test_attributes_that_only_own_blocks_read_change_nothing(
    name: str, part: str, attribute: str, when: str, train: bool
) -> None:
    def change(model: nn.Module, log: Log) -> Undo:
        return set_until_undone(part_of(model, name, part), attribute, False)

    assert_told_alike(name, change, when, train=train, shows=False)


SWAPPED = {
    name: [part for part in parts if part in ("network", "stage", "block", "unit", "pool")]
    for name, parts in PARTS.items()
    if name != "own"
}
each_swapped = pytest.mark.parametrize(
    ("name", "part"), [(name, part) for name, parts in SWAPPED.items() for part in parts]
)


@each_moment
@each_swapped
def test_attributes_may_have_any_name(name: str, part: str, when: str) -> None:
    names = [
        "fold",
        "run",
        "features",
        "settings",
        "problem",
        "known",
        "check",
        "has",
        "norm",
        "pairs",
        "window",
        "plain_forward",
    ]

    def change(model: nn.Module, log: Log) -> Undo:
        module = part_of(model, name, part)
        for i, attribute in enumerate(names):
            assert not hasattr(module, attribute)
            setattr(module, attribute, i)
        return lambda: [delattr(module, attribute) for attribute in names] and None

    assert_told_alike(name, change, when, shows=False)


@each_swapped
def test_fusing_gives_a_module_no_names_that_users_may_have(name: str, part: str) -> None:
    model = new(name)
    module = part_of(model, name, part)
    before = set(dir(module))
    fuse_(model)
    added = {n for n in set(dir(module)) - before if not n.startswith(("fused_", "_fused_", "__"))}
    assert added == {"backend"}


@each_swapped
def test_a_backend_of_the_users_own_stays_and_its_module_is_not_fused(name: str, part: str) -> None:
    model = new(name)
    module = part_of(model, name, part)
    module.backend = own = object()
    kind = type(module)
    report = fuse_(model)
    assert type(module) is kind and module.backend is own and report.fused
    if part != "stage":  # of which a report does not speak
        assert "has an attribute `backend` of its own" in str(report)
    assert_close([model(images())], [new(name)(images())])
    assert unfuse_(model) is model and module.backend is own


@each_moment
@each_model
def test_what_users_hang_on_a_block_stays(name: str, when: str) -> None:
    model = new(name)
    block = part_of(model, name, "block")
    kinds, ids = [type(m) for m in model.modules()], [id(m) for m in model.modules()]
    attributes = {k: v for k, v in vars(block).items() if not k.startswith("_")}
    if when == "after":
        fuse_(model)
        call(model, Told(), False)
    keys = list(model.state_dict())
    block.register_buffer("own_buffer", torch.ones(2, device=DEVICE))
    block.own_parameter = nn.Parameter(torch.ones(3, device=DEVICE))
    block.note, block.own_list = "here", [1]
    seen: list[str] = []
    handle = block.register_forward_hook(lambda *a: seen.append("hook"))
    if when == "before":
        fuse_(model)
    assert [id(m) for m in model.modules()] == ids
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds, strict=True))
    assert {k: v for k, v in vars(block).items() if k in attributes} == attributes | {
        k: vars(block)[k] for k in attributes if k == "backend"
    }
    for attribute in ("expansion",) if hasattr(kinds[ids.index(id(block))], "expansion") else ():
        assert getattr(block, attribute) == getattr(kinds[ids.index(id(block))], attribute)
    prefix = PARTS[name]["block"]
    for _ in range(2):
        assert set(model.state_dict()) == {*keys, f"{prefix}.own_buffer", f"{prefix}.own_parameter"}
        assert any(p is block.own_parameter for p in model.parameters())
        assert (block.note, block.own_list) == ("here", [1])
        call(model, Told(), False)
        unfuse_(model)
    assert seen == ["hook", "hook"]
    assert [type(m) for m in model.modules()] == kinds and [id(m) for m in model.modules()] == ids
    handle.remove()
    call(model, Told(), False)
    assert len(seen) == 2


@each_model
def test_hooks_set_on_a_fused_block_survive_unfuse(name: str) -> None:
    model = new(name)
    fuse_(model)
    log: Log = []
    for part in PARTS[name]:
        observing(part_of(model, name, part), log)
    call(model, Told(), False)
    seen, expected = list(log), log.clear()
    unfuse_(model)
    call(model, Told(), False)
    expected = log
    assert_close([label for label, _ in seen], [label for label, _ in expected])
    assert_close([value for _, value in seen], [value for _, value in expected])
