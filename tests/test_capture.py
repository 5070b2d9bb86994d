"""Plans as graphs: on a GPU CUDA's own; without one a stand-in, which refuses what a capture refuses, and whose replays
do again what was captured, on the memory that it was captured on, and nothing else."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_optimize import Network, agree, change, images, pooled, resnet
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fused_cnn import optimize
from fused_cnn.plan import graph
from fused_cnn.plan import optimized as optimized_module
from fused_cnn.plan.record import _HOST, _takes_places, is_view

HERE = torch.device("cpu")  # the stand-in's


class Refused(RuntimeError):
    pass


class Capture(TorchDispatchMode):
    """Keeps every call, with its tensors; refuses what waits for the device, or goes between it and the host."""

    sees_fused_ops = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _HOST & set(func.tags) and not _takes_places(func, args):
            raise Refused(f"{func} waits for the device")
        used = {t.device for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        others = {*used, kwargs.get("device")} - {HERE, None}
        if others or kwargs.get("pin_memory"):
            raise Refused(f"{func} copies between devices, or allocates outside of the pool")
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]))
        return result


class StandIn(graph.Device):
    """Of a GPU, on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool, self.log = device, None, []
        self.is_capturing = False
        self.replaying = threading.Lock()

    def capturing(self) -> bool:
        return self.is_capturing

    def after_others(self) -> None:
        self.log.append("wait")

    def is_used(self) -> None:
        self.log.append("mark")

    def finish(self) -> None:
        self.log.append("finish")

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any, int]:
        for _ in range(graph.WARM_UPS):
            work()
        with Capture() as captured:
            out = work()
        calls = captured.calls
        inside = {id(t): t for *_, made in calls for t in made}

        def replay() -> None:
            assert self.replaying.acquire(blocking=False), "two at once"
            self.log.append("replay")
            for t in inside.values():  # what a graph's memory holds before is anything
                if t.is_floating_point() and t.untyped_storage().data_ptr() not in outside:
                    t.fill_(float("nan"))
            for func, args, kwargs, made in calls:
                if is_view(func):
                    continue
                found = [t for t in pytree.tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
                for to, t in zip(made, found, strict=True):
                    to.copy_(t)
            self.replaying.release()

        arguments = [t for _, args, kwargs, _ in calls for t in pytree.tree_leaves((args, kwargs))]
        given = [t for t in arguments if isinstance(t, Tensor) and id(t) not in inside]
        outside = {t.untyped_storage().data_ptr() for t in given}
        return replay, out, sum(t.numel() * t.element_size() for t in inside.values())


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimized_module, "graphs_on", StandIn)


on_stand_in = pytest.mark.usefixtures("stand_in")


def eager(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize(
    "work",
    [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.to("meta"), lambda x: bool(x.max() > 0)],
    ids=["item", "mask", "copy", "branch"],
)
def test_the_stand_in_refuses_what_a_capture_refuses(work: Callable[[Tensor], Any]) -> None:
    with pytest.raises(Refused):
        StandIn(torch.device("cpu")).capture(lambda: work(torch.ones(3)))


@on_stand_in
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_replays_give_what_the_network_gives(dtype: torch.dtype | None) -> None:
    model = resnet()
    network = optimize(model, images(), dtype=dtype, batch_sizes=(1, 4), pad_batches=True)
    assert all(isinstance(plan, graph.GraphedPlan) for plan in network._plans.values())
    for batch in (2, 1, 4, 3, 2, 5):
        out = network(images(batch) * 2)
        expected = eager(model, images(batch) * 2)
        agree(out.float(), expected, 1e-4 if dtype is None else 5e-2)  # of twenty roundings to eight bits each
    assert "in a graph's pool" in str(network.table())


@on_stand_in
def test_graphs_of_networks_of_which_nothing_is_fused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(inplace=True), nn.Flatten(), nn.Linear(8 * 62 * 62, 3)).eval()
    network = optimize(model, images())
    agree(network(images(2) + 1), eager(model, images(2) + 1))
    assert "nothing was fused" in str(network.table())


@on_stand_in
def test_changed_weights_reach_the_graphs_in_place() -> None:
    model = resnet("resnet50")
    network = optimize(model, images(), batch_sizes=(1,))
    graphs = dict(network._plans)
    for _ in range(2):
        change(model)
        network.refresh()
        for batch in (1, 2):
            agree(network(images(batch)), eager(model, images(batch)))
    assert network._plans == graphs
    model.fc.weight = nn.Parameter(model.fc.weight.detach() * 2)
    network.refresh()
    agree(network(images()), eager(model, images()))
    assert not set(graphs.values()) & set(network._plans.values())


@on_stand_in
def test_results_are_the_callers_or_with_clone_outputs_false_the_graphs() -> None:
    model = resnet()
    for clone in (True, False):
        network = optimize(model, images(), clone_outputs=clone)
        first, second = network(images()), network(images() + 1)
        assert (first.data_ptr() == second.data_ptr()) != clone
        agree(second, eager(model, images() + 1))
        if clone:
            agree(first, eager(model, images()))


@on_stand_in
def test_every_replay_waits_for_the_last_and_is_waited_for() -> None:
    """Activations of all graphs share memory, on whatever streams they are replayed."""
    network = optimize(resnet(), images(), batch_sizes=(1,))
    log = network._graphs.log
    del log[:]
    network(images())
    network(images(1))
    assert log == ["wait", "replay", "mark"] * 2
    network.refresh()
    assert log[-2:] == ["wait", "mark"]
    errors: list[BaseException] = []

    def call(i: int) -> None:
        try:
            network(images(1 + i % 2))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@on_stand_in
def test_what_cannot_be_captured_runs_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: StandIn, work: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(StandIn, "capture", fails)
    model = resnet()
    network = optimize(model, images())
    assert not network._plans and "not permitted" in network._reason
    agree(network(images(3)), eager(model, images(3)))


@on_stand_in
def test_an_island_without_autocast_stays_one() -> None:
    class Island(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            with torch.autocast("cpu", enabled=False):
                return self.linear(y.float().mean((2, 3))).bfloat16()

    model = Island().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(images())
    network = optimize(model, images(), dtype=torch.bfloat16)
    assert network._plans
    for _ in range(2):
        assert torch.equal(network(images()), expected)
        network.refresh()


@on_stand_in
def test_in_somebody_elses_capture_it_launches() -> None:
    model = resnet()
    network = optimize(model, images())
    network._graphs.is_capturing = True
    del network._graphs.log[:]
    agree(network(images(3)), eager(model, images(3)))
    assert not network._graphs.log


@on_stand_in
def test_a_network_that_reads_values_is_not_captured() -> None:
    model = Network(lambda net, x: pooled(net, x) * (2 if x.sum().item() > 0 else 1)).eval()
    network = optimize(model, images())
    assert not network._plans and "gives the host a value" in network._reason
    agree(network(images()), eager(model, images()))


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_graphs_on_a_gpu(dtype: torch.dtype | None) -> None:
    model = resnet("resnet50").to(memory_format=torch.channels_last)
    network = optimize(model, images(), dtype=dtype, batch_sizes=(1, 4), pad_batches=True)
    streams = [torch.cuda.Stream() for _ in range(3)]
    outs, expected = [], []
    torch.cuda.synchronize()
    for i in range(12):
        x = images(1 + i % 4) + i / 10
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[i % 3]):
            outs.append(network(x))
        expected.append(eager(copy.deepcopy(model).double(), x.double()))
    torch.cuda.synchronize()
    for out, truth in zip(outs, expected, strict=True):
        agree(out.double(), truth, 1e-3 if dtype is None else 5e-2)  # TF32 where it is on
    change(model)
    network.refresh()
    agree(network(images()).double(), eager(copy.deepcopy(model).double(), images().double()), 5e-2)


@pytest.mark.gpu
def test_graphs_are_released_with_the_network() -> None:
    model = resnet()
    optimize(model, images())(images())  # what stays for ever: handles and workspaces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    network = optimize(model, images(16))
    network(images(16))
    assert torch.cuda.memory_allocated() > before
    del network
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
