"""What tools do to modules past their attributes: tables of hooks and children put in place of others, functions and
calls replaced for everybody, modes, parts of another kind, dictionaries copied. Each is done to a fused model whose
weights are folded already, and to its eager twin."""

import copy
import importlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_folded import close, twins
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Model = nn.Module


def halves(module: nn.Module, args: object, out: Tensor) -> Tensor:
    return out * 0.5


def hooks_table(part: str) -> Callable[[Model], None]:
    """The idiom that removes every hook, and one that is set behind it."""

    def change(model: Model) -> None:
        module = model.get_submodule(part)
        module._forward_hooks = OrderedDict()
        module.register_forward_hook(halves)

    return change


def pre_hooks_table(model: Model) -> None:
    module = model.layer2[0].bn1
    module._forward_pre_hooks = OrderedDict()
    module.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def children_table(part: str, child: str) -> Callable[[Model], None]:
    def change(model: Model) -> None:
        module = model.get_submodule(part)
        module._modules = {**module._modules, child: nn.Identity()}

    return change


def other_dictionary(model: Model) -> None:
    torch.manual_seed(5)
    other = copy.deepcopy(model.layer1[0])
    for p in other.parameters():
        p.data = torch.randn_like(p) * 0.1
    model.layer1[0].__dict__.update(other.__dict__)


def plain_attribute(part: str, name: str) -> Callable[[Model], None]:
    """As hypernetworks have it: the block need not see that it changes."""

    def change(model: Model) -> None:
        module = model.get_submodule(part)
        value = getattr(module, name).detach().clone()
        delattr(module, name)
        setattr(module, name, value)
        model(torch.randn(1, 3, 32, 32))
        value += 0.5

    return change


def listed_padding(model: Model) -> None:
    model.layer1[0].conv1.padding = [1, 1]
    model(torch.randn(1, 3, 32, 32))
    model.layer1[0].conv1.padding[:] = [2, 2]
    model.layer1[0].conv2.padding = (0, 0)


def eps_tensor(model: Model) -> None:
    model.layer1[0].bn1.eps = torch.tensor(1e-5)
    model(torch.randn(1, 3, 32, 32))
    model.layer1[0].bn1.eps.fill_(0.5)


def transposed(model: Model) -> None:
    """The very memory, read in another order."""
    weight = model.layer1[0].conv1.weight
    weight.data = weight.data.transpose(2, 3)


def pruned(model: Model) -> None:
    """The upper half of a block's inner channels is cut off, by views of what is there."""
    block = model.layer1[0]
    for t in (block.conv1.weight, *block.bn1.parameters(), block.bn1.running_mean, block.bn1.running_var):
        t.data = t.data[:32]
    block.conv2.weight.data = block.conv2.weight.data[:, :32]


def in_dictionary(part: str, name: str) -> Callable[[Model], None]:
    """Python finds it there before nn.Module looks among parameters and children."""

    def change(model: Model) -> None:
        module = model.get_submodule(part)
        old = getattr(module, name)
        vars(module)[name] = old.detach() * 1.5 if isinstance(old, Tensor) else lambda x: old(x) * 0.5

    return change


class Parameter(nn.Parameter):
    """Named as PyTorch's, and something else."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out * 0.5 if func is F.conv2d else out


def other_kind(model: Model) -> None:
    model.layer1[0].conv1.weight = Parameter(model.layer1[0].conv1.weight.data)


def swapped_for_other_kind(model: Model) -> None:
    weight = model.layer1[0].conv1.weight
    torch.utils.swap_tensors(weight, Parameter(weight.data.clone()))


def of_other_kind(model: Model) -> None:
    model.layer1[0].conv1.weight.__class__ = Parameter


def other_call(model: Model) -> None:
    model.layer1[0].relu._call_impl = lambda x: torch.relu(x) * 0.5


def hidden_at_the_end(model: Model) -> None:
    """A dictionary of the same length and with the same last key, in which something else stands before that."""
    table = vars(model.layer1[0].conv1)
    conv, (name, value) = model.layer1[0].conv1, list(table.items())[-1]
    del table["transposed"], table[name]
    table.update({"forward": lambda x: nn.Conv2d.forward(conv, x) * 0.5, name: value})


SURGERY: dict[str, Callable[[Model], None]] = {
    "hooks of a part": hooks_table("layer1.0.relu"),
    "hooks of a block": hooks_table("layer1.1"),
    "hooks before a part": pre_hooks_table,
    "children of a block": children_table("layer1.0", "relu"),
    "children of a stage": children_table("layer1", "1"),
    "children of the network": children_table("", "relu"),
    "a dictionary of another block": other_dictionary,
    "gamma": plain_attribute("layer1.0.bn1", "weight"),
    "a mean": plain_attribute("layer1.0.bn2", "running_mean"),
    "padding in a list": listed_padding,
    "eps in a tensor": eps_tensor,
    "a weight read in another order": transposed,
    "channels cut off": pruned,
    **{
        f"{name} of {part} in its dictionary": in_dictionary(f"layer1.0.{part}".rstrip("."), name)
        for part, name in (("conv1", "weight"), ("bn1", "weight"), ("bn2", "running_mean"), ("", "relu"), ("", "conv2"))
    },
    "a weight of a kind of its own": other_kind,
    "a weight swapped for one of another kind": swapped_for_other_kind,
    "a weight that becomes of another kind": of_other_kind,
    "a call of its own": other_call,
    "a forward in the middle of a dictionary": hidden_at_the_end,
}


@pytest.mark.parametrize("what", SURGERY)
@torch.no_grad()
def test_surgery_is_seen(what: str) -> None:
    eager, fused, x = twins()
    before = fused(x)
    for model in (eager, fused):
        SURGERY[what](model)
    for _ in range(4):
        close(fused(x), eager(x))
    assert (eager(x) - before).abs().max() > 0.01, "the change shows nowhere"


@pytest.mark.parametrize("train", [False, True])
def test_a_part_of_a_forward_set_on_a_block_runs(train: bool) -> None:
    eager, fused, x = twins("googlenet", aux_logits=False)
    with torch.no_grad():
        fused(x)
    for model in (eager, fused):
        block = model.inception3a
        block._forward = lambda x, b=block: [b.branch1(x) * 0.5, b.branch2(x), b.branch3(x), b.branch4(x)]
        block.train(train)
    x = torch.randn(2, 192, 8, 8, device=x.device)
    close(fused.inception3a(x), eager.inception3a(x))


def test_a_norm_that_counts_twice_counts_in_the_order_of_the_passes() -> None:
    eager, fused, x = twins()
    for model in (eager, fused):
        block = model.train().layer2[0]
        block.downsample[1] = block.bn2
        block.bn2.momentum = None
        for i in range(3):
            model(x + i)
    for mine, theirs in zip(fused.buffers(), eager.buffers(), strict=True):
        close(mine, theirs)


def bias_attribute(model: Model) -> None:
    model.layer1[0].conv1.bias = nn.Parameter(torch.zeros(64))


@torch.no_grad()
def test_a_convolutions_bias_that_is_a_plain_attribute_is_read() -> None:
    eager, fused, x = twins()
    for model in (eager, fused):
        bias_attribute(model)
        fused(x)
        plain_attribute("layer1.0.conv1", "bias")(model)
    close(fused(x), eager(x))


@pytest.fixture
def patched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Replaces something for everybody once it is called."""
    owner, name, make = (PATCHES | GOOGLENETS)[request.param]

    def patch() -> None:
        monkeypatch.setattr(owner, name, make(getattr(owner, name)), raising=True)

    yield patch


def halved(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: function(*args, **kwargs) * 0.5


def halving(name: str) -> Callable[[object], object]:
    """A module in which this function halves."""
    return lambda module: SimpleNamespace(**{**vars(module), name: halved(getattr(module, name))})


def halved_table(table: object) -> OrderedDict[int, object]:
    return OrderedDict({0: lambda module, args, out: out * 0.5 if isinstance(module, nn.ReLU) else None})


PATCHES: dict[str, tuple[object, str, Callable[..., object]]] = {
    "F.conv2d": (F, "conv2d", halved),
    "F.batch_norm": (F, "batch_norm", halved),
    "F.relu": (F, "relu", halved),
    "Conv2d.__call__": (nn.Conv2d, "__call__", halved),
    "ReLU.__call__": (nn.ReLU, "__call__", halved),
    "_ConvNd._call_impl": (nn.modules.conv._ConvNd, "_call_impl", halved),
    "Sequential.__call__": (nn.Sequential, "__call__", halved),
    "everybody's hooks": (nn_module, "_global_forward_hooks", halved_table),
    "torch.batch_norm": (torch, "batch_norm", halved),
    "torch.relu_": (torch, "relu_", halved),
    "torch.max_pool2d": (torch, "max_pool2d", halved),
    "Tensor.__iadd__": (Tensor, "__iadd__", halved),
    "what convolutions call F": (nn.modules.conv, "F", halving("conv2d")),
}
googlenet = importlib.import_module("torchvision.models.googlenet")  # whose name is a function's in its package
GOOGLENETS: dict[str, tuple[object, str, Callable[..., object]]] = {
    "torch.cat": (torch, "cat", halved),
    "what GoogLeNet calls F": (googlenet, "F", halving("relu")),
    "what GoogLeNet calls torch": (googlenet, "torch", halving("cat")),
}


@pytest.mark.parametrize(
    ("patched", "name"),
    [*((name, "resnet18") for name in PATCHES), *((name, "googlenet") for name in GOOGLENETS)],
    indirect=["patched"],
)
@torch.no_grad()
def test_what_is_replaced_for_everybody_is_seen(
    patched: Callable[[], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, fused, x = twins(name)
    before = fused(x)
    patched()
    expected = eager(x)
    close(fused(x), expected)
    assert (expected - before).abs().max() > 0.01, "the change shows nowhere"
    monkeypatch.undo()
    close(fused(x), before)


class HalvesConvolutions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        return out * 0.5 if func is F.conv2d else out


class CountsConvolutions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_modes_see_pytorchs_own_operators() -> None:
    eager, fused, x = twins()
    before = fused(x)
    with HalvesConvolutions():
        expected = eager(x)
        close(fused(x), expected)
    assert (expected - before).abs().max() > 0.01
    counted = []
    for model in (eager, fused):
        with CountsConvolutions() as mode:
            model(x)
        counted.append(mode.count)
    assert counted == [20, 20]
    close(fused(x), before)


@torch.no_grad()
def test_a_default_device_leaves_blocks_fused() -> None:
    """It is a mode too, but one that changes nothing that a block computes."""
    _, fused, x = twins("resnet18")
    fused(x)
    with torch.device(x.device):
        fused.layer1(torch.randn_like(fused.maxpool(fused.relu(fused.bn1(fused.conv1(x))))))
    (form,) = fused.layer1._fused_owner.forms
    assert form.uses == 2


def cloned(module: nn.Module) -> nn.Module:
    """A module with the same everything in dictionaries of its own, as meta-learning libraries make it."""
    clone = type(module).__new__(type(module))
    clone.__dict__ = dict(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        clone.__dict__[name] = dict(module.__dict__[name])
    for name, p in module._parameters.items():
        clone._parameters[name] = None if p is None else p.detach().clone()
    for name, child in module._modules.items():
        clone._modules[name] = None if child is None else cloned(child)
    return clone


@torch.no_grad()
def test_a_clone_by_dictionaries_has_weights_of_its_own() -> None:
    eager, fused, x = twins()
    before = fused(x)
    clones = [cloned(model) for model in (eager, fused)]
    for clone in clones:
        clone.layer1[0].bn1.weight.add_(1)
        clone.conv1.weight.mul_(1.5)
    for _ in range(3):
        close(clones[1](x), clones[0](x))
        close(fused(x), before)
    assert (clones[0](x) - before).abs().max() > 0.01


@torch.no_grad()
def test_a_replaced_convolution_is_freed() -> None:
    """With its weights, and what was folded of them."""
    _, fused, x = twins()
    with torch.autocast(x.device.type, torch.bfloat16):
        fused(x)
    fused(x)
    gone = weakref.ref(fused.layer1[0].conv1.weight)
    fused.layer1[0].conv1 = copy.deepcopy(fused.layer1[0].conv1)
    fused(x)
    assert gone() is None


@torch.no_grad()
def test_another_layout_of_memory_runs_unfused() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    eager, fused, x = twins()
    if x.is_cuda:
        pytest.skip("oneDNN's layout is the processor's")
    for model in (eager, fused):
        model.to(memory_format=torch.contiguous_format)
    images = x.contiguous().to_mkldnn()
    blocks = [nn.Sequential(m.conv1, m.bn1, m.relu, m.maxpool) for m in (eager, fused)]
    close(blocks[1](images).to_dense(), blocks[0](images).to_dense())
