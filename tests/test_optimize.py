"""optimize: a network's plan gives what the network gives, for every shape, from every thread, after every change of
its weights; and what cannot be planned runs as it is, and says so."""

import copy
import gc
import io
import threading
import warnings
import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_cnn.analysis
from fused_cnn import models, optimize
from fused_cnn.bench.networks import make_statistics_real
from fused_cnn.plan import optimized as optimized_module
from fused_cnn.plan.lower import Program
from fused_cnn.plan.optimized import SHAPES, OptimizedModel

on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="looks at what a plan is on a CPU")
Pair = namedtuple("Pair", ["scores", "features"])
PIXELS = 64


def images(batch: int = 2, size: int = PIXELS, channels: int = 3) -> Tensor:
    torch.manual_seed(batch)
    return torch.randn(batch, channels, size, size, device=DEVICE)


def real(model: nn.Module, size: int = PIXELS) -> nn.Module:
    """With BatchNorm statistics of its own, in eval."""
    model = model.to(DEVICE)
    with torch.no_grad():
        make_statistics_real(model, images(4, size))
    return model.eval()


def resnet(blocks: str = "resnet18") -> nn.Module:
    torch.manual_seed(0)
    return real(getattr(models, blocks)(num_classes=11, backend="reference"))


def agree(out: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Relative to the largest: a network's float32 sums come in another order, and BatchNorm is folded into weights."""
    assert isinstance(out, Tensor) and out.shape == expected.shape
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()


class Network(nn.Module):
    """A stem, whose kind the tests choose, and what fuse_ knows behind it."""

    def __init__(self, forward: Callable[["Network", Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.run = forward
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.block = fused_cnn.nn.BasicBlock(16, 16, backend="reference")
        self.linear = nn.Linear(16, 5)
        self.register_buffer("seen", torch.zeros(()))

    def features(self, x: Tensor) -> Tensor:
        return self.block(F.relu(self.conv(x)))

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def pooled(network: Network, x: Tensor) -> Tensor:
    return network.linear(network.features(x).mean((2, 3)))


class Dispatches(TorchDispatchMode):
    sees_fused_ops = True

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


# What it gives.


@pytest.mark.parametrize("name", ["googlenet", "resnet18", "resnet50"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_gives_what_it_gave(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = real(getattr(models, name)(num_classes=11, backend="reference"))
    x = images(3)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        eager = model(x)
        if dtype != torch.float32:
            with torch.autocast(DEVICE, dtype):
                eager = model(x)
    out = optimize(model, x, dtype=None if dtype == torch.float32 else dtype)(x)
    assert out.dtype == eager.dtype
    # As all comparisons in this dtype: twice eager's error, and what one rounding of the scores is worth.
    bound = 2 * (eager - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
    assert (out - truth).abs().max() <= bound


@on_cpu
@pytest.mark.parametrize("name", ["googlenet", "resnet50"])
def test_a_whole_network_is_one_call(name: str) -> None:
    """No Python, and nothing of PyTorch's, runs between its steps: the last view gives (N, classes) of (N, classes, 1,
    1)."""
    model = real(getattr(models, name)(num_classes=11, backend="reference"))
    x = images().contiguous(memory_format=torch.channels_last)
    network = optimize(model, x)
    (plan,) = network._plans.values()
    assert [type(part) for part in plan.parts] == [Program]
    with Dispatches() as optimized:
        network(x)
    fused = copy.deepcopy(model)
    fused_cnn.fuse_(fused)
    with torch.no_grad():
        for _ in range(3):  # a copy folds at its second call
            fused(x)
        with Dispatches() as launched:
            fused(x)
    assert optimized.names == ["aten::empty", "fused_cnn::run_plan_into", "aten::view"]
    assert len(launched.names) > len(optimized.names)
    assert 0 < plan.bytes < plan.bytes_without_overlap / 2


@pytest.mark.usefixtures("nan_filled_memory")
def test_nothing_is_read_that_was_not_written() -> None:
    model, x = resnet("resnet50"), images()
    network = optimize(model, x)
    first = network(x).clone()
    assert first.isfinite().all() and torch.equal(network(x), first)


def test_the_model_stays_as_it_was() -> None:
    model = resnet().train()
    kinds, held = [type(m) for m in model.modules()], [*model.parameters(), *model.buffers()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = optimize(model, images())
    network(images())
    assert model.training and [type(m) for m in model.modules()] == kinds
    assert all(a is b for a, b in zip(held, [*model.parameters(), *model.buffers()], strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert network.model is model and not network.training and not list(network.parameters())


def test_weights_are_folded_in_their_own_dtype() -> None:
    """In bfloat16 a scale that BatchNorm makes large would round away what a float32 weight says."""
    torch.manual_seed(3)
    model = resnet()
    x = images(4)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        rounded_first = optimize(copy.deepcopy(model).bfloat16().float(), x, dtype=torch.bfloat16)(x)
    out = optimize(model, x, dtype=torch.bfloat16)(x)
    assert (out - truth).abs().mean() < (rounded_first - truth).abs().mean()


@pytest.mark.parametrize("result", ["tuple", "list", "named tuple", "dict", "ordered dict", "constant"])
def test_results_have_the_structure_that_the_network_gives(result: str) -> None:
    def run(network: Network, x: Tensor) -> Any:
        features = network.features(x)
        scores = network.linear(features.mean((2, 3)))
        if result == "constant":
            return scores, network.linear.bias, 3, None
        return {
            "tuple": (scores, features),
            "list": [scores, [features]],
            "named tuple": Pair(scores, features),
            "dict": {"scores": scores, "features": features},
            "ordered dict": OrderedDict(scores=scores, features=features),
        }[result]

    model, x = Network(run).to(DEVICE).eval(), images()
    with torch.no_grad():
        expected = model(x)
    network = optimize(model, x)
    assert network._plans
    out = network(x)
    assert type(out) is type(expected)
    for a, b in zip(fused_cnn._trees.tensors(out), fused_cnn._trees.tensors(expected), strict=True):
        agree(a, b)


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 + 7, 4)

        def forward(self, image: Tensor, vector: Tensor) -> Tensor:
            return self.linear(torch.cat([F.relu(self.conv(image)).mean((2, 3)), vector], 1))

    model = Two().to(DEVICE).eval()
    inputs = images(), torch.randn(2, 7, device=DEVICE)
    with torch.no_grad():
        agree(optimize(model, inputs)(*inputs), model(*inputs))


# What is not planned.


def reads_a_value(network: Network, x: Tensor) -> Tensor:
    y = network.features(x)
    return y * 2 if y.sum().item() > 0 else y


def counts_calls(network: Network, x: Tensor) -> Tensor:
    network.seen += 1
    return network.features(x)


def changes_its_input(network: Network, x: Tensor) -> Tensor:
    return network.features(x.mul_(1.0))


def goes_around_pytorch(network: Network, x: Tensor) -> Tensor:
    return network.features(x) + torch.from_numpy(x.detach().cpu().numpy().copy()).to(x.device).mean()


def is_random(network: Network, x: Tensor) -> Tensor:
    return F.dropout(network.features(x), training=True)


def adds_to_a_buffers_view(network: Network, x: Tensor) -> Tensor:
    network.seen.view(1)[0] += 1
    return network.features(x)


def around_pytorch_behind_infinity(network: Network, x: Tensor) -> Tensor:
    y = goes_around_pytorch(network, x)
    return torch.cat([y, torch.full_like(y, float("-inf"))], 1)


class Box:
    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (reads_a_value, "gives the host a value"),
        (counts_calls, "changes a parameter or buffer"),
        (changes_its_input, "changes an input"),
        (goes_around_pytorch, "other results on other inputs"),
        (is_random, "other results on other inputs"),
        (lambda network, x: Box(network.features(x)), "returns a Box"),
        (lambda network, x: network.features(x) * network.seen.add(2.0).item(), "gives the host a value"),
        (lambda network, x: network.features(x) if network.seen.sum() < 1 else x, "gives the host a value"),
        (adds_to_a_buffers_view, "changes a parameter or buffer"),
        (around_pytorch_behind_infinity, "other results on other inputs"),
    ],
    ids=["value", "buffer", "input", "numpy", "random", "box", "item", "branch", "view", "infinity"],
)
def test_what_cannot_be_made_again_runs_without_a_plan_and_says_why(forward: Any, reason: str) -> None:
    model, x = Network(forward).to(DEVICE).eval(), images()
    network = optimize(model, x)
    assert not network._plans and reason in network._reason
    assert reason in str(network.table())
    for value in (x, -x):
        torch.manual_seed(0)
        with torch.no_grad():
            expected = model(value.clone())
        torch.manual_seed(0)
        out = network(value.clone())
        out, expected = (y.scores if isinstance(y, Box) else y for y in (out, expected))
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)


def test_a_network_that_fuse_does_not_know_is_planned_with_a_row_a_step() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))
    model, x = model.to(DEVICE).eval(), images()
    network = optimize(model, x)
    with torch.no_grad():
        agree(network(x), model(x))
    table = network.table()
    assert "nothing was fused" in str(table) and network._plans
    assert {"convolution", "hardswish", "addmm"} <= {row.op for row in table.rows if row.runs == "PyTorch"}


@pytest.mark.parametrize(
    "forward",
    [
        lambda network, x: network.features(x) / network.features(x).mean(),
        lambda network, x: network.block(F.relu(network.conv(x)).contiguous()).flatten(1),
        lambda network, x: (network.features(x).view(torch.int32) & -2).view(torch.float32),
        lambda network, x: network.features(x[:, [2, 1, 0]]),
        lambda network, x: network.features(x).mean((2, 3), keepdim=True).squeeze(),
        lambda network, x: torch.cat([network.features(x), x], -3).amax((2, 3)),
        lambda network, x: torch.addmm(
            network.linear.bias, network.features(x).mean((2, 3)), network.linear.weight.t(), beta=2
        ),
        lambda network, x: torch.addmm(
            network.seen.view(1) + 1, network.features(x).mean((2, 3)), network.linear.weight.t()
        ),
        lambda network, x: network.features(x).mean((2, 3)).relu_().add_(1.0).t(),
        lambda network, x: torch.stack(network.features(x).chunk(2, 1)[::-1]),
    ],
    ids=["mean", "contiguous", "bits", "bgr", "squeeze", "cat", "beta", "one bias", "in place", "chunks"],
)
def test_operators_that_look_like_a_step_and_are_none(forward: Any) -> None:
    model, x = Network(forward).to(DEVICE).eval(), images()
    network = optimize(model, x)
    assert network._plans, network._reason
    for value in (x, -2 * x):
        with torch.no_grad():
            torch.testing.assert_close(network(value), model(value), rtol=1e-3, atol=1e-4)


def test_a_constant_of_the_result_is_the_callers() -> None:
    model = Network(lambda net, x: (pooled(net, x), torch.arange(5.0, device=x.device) + net.seen)).to(DEVICE).eval()
    network = optimize(model, images())
    network(images())[1].zero_()
    assert network(images())[1].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_integers_and_vectors_in_any_layout() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv = nn.Embedding(9, 6), nn.Conv2d(3, 6, 3)

        def forward(self, image: Tensor, kind: Tensor, vectors: Tensor) -> Tensor:
            return F.relu(self.conv(image)).mean((2, 3)) + self.table(kind) + vectors.flatten(1)[:, :6]

    model = Embedded().to(DEVICE).eval()
    vectors = torch.randn(2, 7, 4, device=DEVICE)
    inputs = images(), torch.tensor([3, 8], device=DEVICE), vectors
    network = optimize(model, inputs)
    assert network._plans and network.table().rows
    others = images() + 1, torch.tensor([0, 5], device=DEVICE), torch.randn(2, 4, 7, device=DEVICE).transpose(1, 2)
    with torch.no_grad():
        for given in (inputs, others):
            agree(network(*given), model(*given))


def test_pytorchs_own_numbers_go_on_as_they_were() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    model = resnet()
    torch.manual_seed(0)
    optimize(model, images_without_a_seed(), batch_sizes=(1,))
    assert torch.equal(torch.rand(3), expected)


def images_without_a_seed() -> Tensor:
    return torch.zeros(2, 3, PIXELS, PIXELS, device=DEVICE)


# Shapes.


def test_other_shapes_get_plans_of_their_own_and_the_least_used_gives_way() -> None:
    model, x = resnet(), images()
    network = optimize(model, x)
    for batch in range(3, 2 + SHAPES):
        network(images(batch, 32))
    assert len(network._plans) == SHAPES
    network(x)  # so that it is not the oldest
    new, oldest = images(1, 48), (tuple(images(3, 32).shape),)
    with pytest.warns(RuntimeWarning, match="without a plan") as told:
        out = network(new)
    with torch.no_grad():
        agree(out, model(new))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(network(new), out)  # it came again
        agree(network(images(2, 48)), model(images(2, 48)).detach())  # another, of which it does not tell again
    assert len(told) == 1
    assert (tuple(new.shape),) in network._plans and (tuple(x.shape),) in network._plans
    assert oldest not in network._plans and len(network._plans) == SHAPES


def test_shapes_in_turn_do_not_push_each_other_out() -> None:
    network = optimize(Network(pooled).to(DEVICE).eval(), images(1, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plans = []
        for _ in range(3):
            for batch in range(1, SHAPES + 3):
                network(images(batch, 16))
            plans.append({key: id(plan) for key, plan in network._plans.items()})
    assert plans[0] == plans[1] == plans[2] and len(plans[0]) == SHAPES


def test_sizes_of_a_prepared_batch_are_shapes_as_others() -> None:
    network = optimize(Network(pooled).to(DEVICE).eval(), images(1), batch_sizes=(1,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size in range(16, 40):
            network(images(1, size))
    assert len(network._plans) == SHAPES + 1


def test_batches_are_planned_ahead_and_smaller_ones_run_in_the_next_larger() -> None:
    model, x = resnet(), images(2)
    network = optimize(model, x, batch_sizes=(4, 1, 8), pad_batches=True)
    planned = set(network._plans)
    assert {shapes[0][0] for shapes in planned} == {1, 2, 4, 8}
    for batch in range(1, 8):
        with torch.no_grad():
            agree(network(images(batch)), model(images(batch)))
    assert set(network._plans) == planned
    network(images(9))
    assert {shapes[0][0] for shapes in network._plans} == {1, 2, 4, 8, 9}


def test_only_rows_are_padded() -> None:
    """A result that has no row for each image would be cut in the wrong place."""
    model = Network(lambda net, x: (pooled(net, x), net.features(x).mean(0), net.linear.bias)).to(DEVICE).eval()
    network = optimize(model, images(4), batch_sizes=(4,), pad_batches=True)
    with torch.no_grad():
        for out, expected in zip(network(images(3)), model(images(3)), strict=True):
            agree(out, expected)


@pytest.mark.parametrize("result", ["turned", "counted"])
def test_what_only_looks_like_rows_is_not_padded(result: str) -> None:
    """Five classes and five images."""
    turned = result == "turned"
    model = Network(lambda net, x: pooled(net, x).t() if turned else (pooled(net, x), x.size(0))).to(DEVICE).eval()
    network = optimize(model, images(5), batch_sizes=(5,), pad_batches=True)
    with torch.no_grad():
        out, expected = network(images(3)), model(images(3))
    assert turned or out[1] == 3
    agree(out if turned else out[0], expected if turned else expected[0])


def test_plans_made_ahead_stay() -> None:
    network = optimize(resnet(), images(1), batch_sizes=(1, 2))
    for batch in range(3, 3 + SHAPES):
        network(images(batch, 32))
    with pytest.warns(RuntimeWarning, match="without a plan"):
        network(images(1, 48))
    network(images(1, 48))
    sizes = [shapes[0][0] for shapes in network._plans]
    assert {1, 2} <= set(sizes) and (tuple(images(1).shape),) in network._plans


def test_an_empty_batch_runs() -> None:
    assert optimize(resnet(), images())(images()[:0]).shape == (0, 11)


# Changed weights.


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for p in (*model.parameters(), *model.buffers()):
            if p.is_floating_point():
                p.mul_(0.95)


def test_refresh_takes_changed_weights_in_in_place() -> None:
    model, x = resnet("resnet50"), images()
    network = optimize(model, x)
    (plan,) = network._plans.values()
    network(x)
    for _ in range(2):
        change(model)
        assert network.refresh() is network
        with torch.no_grad():
            agree(network(x), model(x))
        assert [*network._plans.values()] == [plan]


@pytest.mark.parametrize("how", ["data", "weight", "parameter", "module", "activation", "loaded"])
def test_refresh_makes_anew_what_lies_elsewhere(how: str) -> None:
    model, x = resnet(), images()
    if how == "weight":
        model.fc = nn.Linear(model.fc.in_features, 11, bias=False).to(DEVICE)
    network = optimize(model, x, batch_sizes=(4,), pad_batches=True)
    other = resnet()
    change(other)
    if how == "data":
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.data = q.data.clone()
    elif how == "weight":
        model.fc.weight.data = model.fc.weight.data * 3
    elif how == "activation":
        model.layer2[0].relu = nn.SiLU()
    elif how == "parameter":
        model.fc.weight = nn.Parameter(model.fc.weight.detach() * 2)
    elif how == "module":
        model.fc = nn.Sequential(nn.Linear(model.fc.in_features, 7), nn.ReLU()).to(DEVICE)
    else:
        model.load_state_dict(other.state_dict(), assign=True)
    network.refresh()
    assert {shapes[0][0] for shapes in network._plans} == {2, 4}
    with torch.no_grad():
        agree(network(x), model(x))
        agree(network(images(3)), model(images(3)))
    assert len(network._plans) == 2


def test_it_is_frozen_until_refresh() -> None:
    model, x = resnet(), images()
    network = optimize(model, x)
    before = network(x).clone()
    with torch.no_grad():
        model.fc.weight.mul_(3.0)
        model.conv1.weight.mul_(1.5)
    if DEVICE == "cpu":  # where nothing of it reads the model's own
        assert torch.equal(network(x), before)
    network.refresh()
    with torch.no_grad():
        agree(network(x), model(x))


# Where it is called.


def test_threads_get_what_is_theirs() -> None:
    model = resnet()
    network = optimize(model, images())
    inputs = [images(1 + i % 5) + i for i in range(40)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for out, truth in zip(pool.map(network, inputs), expected, strict=True):
            agree(out, truth)
    assert len(network._plans) == 5


def test_results_belong_to_their_caller() -> None:
    network = optimize(resnet(), images())
    first = network(images())
    kept = first.clone()
    network(images() + 1)
    assert torch.equal(first, kept)
    first.zero_()
    agree(network(images()), kept)


@pytest.mark.parametrize("inference", [True, False])
def test_it_is_right_under_inference_mode_and_outside_of_one(inference: bool) -> None:
    model, x = resnet(), images()
    with torch.inference_mode(inference):
        network = optimize(model, x)
        first = network(images(3))
    with torch.inference_mode(not inference):
        for batch in (2, 3, 4):
            agree(network(images(batch)).clone(), model(images(batch)).detach())
    assert first.is_inference() == inference
    network.refresh()


def test_autocast_around_it_changes_nothing() -> None:
    model = Network(pooled).to(DEVICE).eval()
    network = optimize(model, images())
    plain, casting = network(images()), optimize(model, images(), dtype=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(network(images()), plain)
        assert torch.equal(network(images(3))[:0], plain[:0])
        inside = casting(images())
    assert inside.dtype == torch.bfloat16 and torch.equal(casting(images()), inside)


class Scored(torch.utils.data.Dataset):
    def __init__(self, network: OptimizedModel) -> None:
        self.network = network

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        return self.network(images(1) + i)[0]


@on_cpu
def test_it_runs_in_workers_of_a_data_loader() -> None:
    model = resnet()
    network = optimize(model, images(1))
    network(images(1))
    loader = torch.utils.data.DataLoader(Scored(network), 3, num_workers=2, multiprocessing_context="fork")
    with torch.no_grad():
        agree(torch.cat(list(loader)), torch.cat([model(images(1) + i) for i in range(6)]))


def test_it_is_released_without_the_garbage_collector() -> None:
    network = optimize(resnet(), images())
    network(images())
    plan, gone = weakref.ref(next(iter(network._plans.values()))), weakref.ref(network)
    gc.disable()
    try:
        del network
        assert gone() is None and plan() is None
    finally:
        gc.enable()


# What is saved, and what is refused.


@pytest.mark.parametrize("how", ["torch.save", "deepcopy"])
def test_its_model_and_options_are_saved_and_the_rest_is_made_again(how: str) -> None:
    network = optimize(resnet(), images(), dtype=torch.bfloat16, batch_sizes=(1, 4), pad_batches=True)
    expected = network(images())
    if how == "deepcopy":
        again = copy.deepcopy(network)
    else:
        file = io.BytesIO()
        torch.save(network, file)
        weights = sum(p.numel() * p.element_size() for p in network.model.parameters())
        assert file.tell() < 1.1 * weights + 200_000  # no packed ones
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert again.model is not network.model and again._plans.keys() == network._plans.keys()
    assert again.pad_batches and torch.equal(again(images()), expected)


def test_a_plan_with_its_packed_weights_is_not_saved() -> None:
    (plan,) = optimize(resnet(), images())._plans.values()
    with pytest.raises(TypeError, match="save the OptimizedModel"):
        torch.save(plan, io.BytesIO())


def test_wrong_inputs_are_one_clear_error() -> None:
    network = optimize(resnet(), images())
    for inputs, error, message in (
        ((), TypeError, r"1 tensors are wanted, as in the example, got \(\)"),
        ((images(), images()), TypeError, r"got \(Tensor, Tensor\)"),
        (("image",), TypeError, r"got \(str\)"),
        ((images()[0],), ValueError, r"must be \(N, 3, H, W\), torch.float32, on .*, got \(3, 64, 64\)"),
        ((images(channels=4),), ValueError, r"got \(2, 4, 64, 64\)"),
        ((images().double(),), TypeError, "torch.float64"),
        ((images().to("meta"),), ValueError, "on meta"),
    ):
        with pytest.raises(error, match=message):
            network(*inputs)
    with pytest.raises(RuntimeError, match="no gradients"):
        network(images().requires_grad_())
    with torch.no_grad():
        network(images().requires_grad_())
    for wrong in (network.train, network.half, lambda: network.to("cpu", torch.float64)):
        with pytest.raises(RuntimeError, match=r"\.model"):
            wrong()
    assert network.eval() is network


def test_wrong_arguments_are_errors() -> None:
    model, x = resnet(), images()
    for arguments, options, error, message in (
        ((type(model), x), {}, TypeError, "must be an nn.Module"),
        ((model, 3), {}, TypeError, "example_inputs"),
        ((model, ()), {}, TypeError, "example_inputs"),
        ((model, x.to("meta")), {}, ValueError, "on meta"),
        ((model, x), {"dtype": torch.float64}, ValueError, "dtype"),
        ((model, x), {"backend": "cuda"}, ValueError, "backend"),
        ((model, x), {"batch_sizes": (0,)}, ValueError, "batch_sizes"),
        ((model, x), {"batch_sizes": 8}, ValueError, "batch_sizes"),
        ((model, x), {"pad_batches": True}, ValueError, "batch_sizes"),
    ):
        with pytest.raises(error, match=message):
            optimize(*arguments, **options)


# The table.


def test_the_table_has_every_step_and_what_it_costs() -> None:
    network = optimize(real(models.googlenet(num_classes=11, backend="reference")), images())
    table = network.table()
    rows = table.to_dict()["rows"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(row["measured"] > 0 and row["bytes"] > 0 for row in rows)
    if DEVICE == "cpu":
        assert {row["runs"] for row in rows} == {"native"} and len(rows) == 18
        assert [row["op"] for row in rows].count("inception") == 9
        assert table.arena < table.without_overlap
        assert "in one arena" in str(table)
    names = dict(network.model.named_modules())
    named = [row["layer"] for row in rows if row["layer"]]
    assert set(named) <= {"stem", *names} and len(named) >= 13
    moved = fused_cnn.analysis.count(network, images())
    assert not moved.unknown


def test_plans_are_made_one_at_a_time_whoever_asks() -> None:
    network = optimize(resnet(), images())
    made, inside = [], []
    real_made = network._made

    def slow(inputs: Any) -> Any:
        inside.append(1)
        assert len(inside) == 1
        made.append(tuple(inputs[0].shape))
        out = real_made(inputs)
        inside.pop()
        return out

    vars(network)["_made"] = slow
    threads = [threading.Thread(target=network, args=(images(3 + i % 2),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [(3, 3, 64, 64), (4, 3, 64, 64)]
    assert optimized_module._lock.acquire(blocking=False)
    optimized_module._lock.release()
