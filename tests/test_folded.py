"""The owner of folded weights: what is made, when, for whom, and when its memory goes; and what derivatives and other
transforms of a fused model give."""

import copy
import gc
import multiprocessing
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from test_fuse import lively, tv
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fused_cnn
from fused_cnn import StaleWeightsError, detect_stale_weights, fuse_, refresh, unfuse_
from fused_cnn.nn import FusedModule, cache, fold, snapshot
from fused_cnn.nn.snapshot import Snapshot


def twins(name: str = "resnet18", **options: object) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    eager = lively(tv(name, **options)).eval()
    fused = copy.deepcopy(eager)
    fuse_(fused)
    return eager, fused, torch.randn(2, 3, 64, 64, device=DEVICE).contiguous(memory_format=torch.channels_last)


def close(actual: Tensor, expected: Tensor) -> None:
    # Float32 sums over thousands of products in another order, through some twenty layers.
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many convolutions have been folded since it was asked last."""
    count = 0
    original = fold.fold_tensors

    def counting(*args: object) -> object:
        nonlocal count
        count += 1
        return original(*args)

    def since() -> int:
        nonlocal count
        found, count = count, 0
        return found

    monkeypatch.setattr(fold, "fold_tensors", counting)
    yield since


CONVOLUTIONS = 20  # of resnet18


@torch.no_grad()
def test_what_did_not_change_is_not_made_again(folds: Callable[[], int]) -> None:
    _, fused, x = twins()
    fused(x)
    assert folds() == CONVOLUTIONS
    for _ in range(3):
        fused.eval()
        fused(x)
        fused.train()
        fused.eval()
        fused(x)
    handle = fused.layer1[0].conv1.register_forward_hook(lambda *a: None)
    fused(x)
    handle.remove()
    fused(x)
    fused.layer1[0].note = fused.layer1[0].conv1.note = object()  # nothing that a forward reads
    fused(x)
    assert folds() == 0


@torch.no_grad()
def test_autocast_and_other_dtypes_in_turn_have_forms_of_their_own(folds: Callable[[], int]) -> None:
    eager, fused, x = twins()
    for turn in range(3):
        close(fused(x), eager(x))
        with torch.autocast(DEVICE, torch.bfloat16):
            mine, theirs = fused(x), eager(x)
        # Rounding to 8 bits of mantissa after each layer, in each of them at other places.
        assert mine.dtype == theirs.dtype and (mine - theirs).norm() < 0.05 * theirs.norm()
        assert folds() == (2 * CONVOLUTIONS if turn == 0 else 0)


@torch.no_grad()
def test_one_changed_block_costs_one_block(folds: Callable[[], int]) -> None:
    eager, fused, x = twins()
    for _ in range(cache.PAYS):  # a form that has been of use is made again at once
        fused(x)
    folds()
    for model in (eager, fused):
        model.layer2[1].bn1.bias.add_(0.1)
    close(fused(x), eager(x))
    assert folds() == 2


@torch.no_grad()
def test_what_keeps_changing_is_not_folded(folds: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Folding and packing take many times what a forward pass does; then plain PyTorch is the fastest, and to ask at
    every call what has changed would be felt too."""
    eager, fused, x = twins()
    states = [fused.state_dict(), {k: v * 0.9 for k, v in fused.state_dict().items()}]
    states = [{k: v.clone() for k, v in state.items()} for state in states]
    fused(x)
    folds()
    for i in range(8):
        for model in (eager, fused):
            model.load_state_dict(states[i % 2])
        close(fused(x), eager(x))
    assert folds() == 0
    asked = mock.Mock(wraps=cache.Form)
    monkeypatch.setattr(cache, "Form", asked)
    for i in range(4 * cache.PAYS):
        fused.load_state_dict(states[i % 2])
        fused(x)
    eager.load_state_dict(states[1])
    blocks = sum(isinstance(m, FusedModule) for m in fused.modules())
    assert asked.call_count < 6 * blocks  # about one in PAYS calls, once the block has learnt
    assert folds() == 0
    for _ in range(2 * (cache.PAYS + 1)):  # then it rests
        close(fused(x), eager(x))
    assert folds() == CONVOLUTIONS
    fused(x)
    assert folds() == 0


@torch.no_grad()
def test_parameters_in_turn_by_functional_call_each_have_a_form(folds: Callable[[], int]) -> None:
    eager, fused, x = twins()
    states = [{k: v.clone() for k, v in fused.state_dict().items()} for _ in range(2)]
    for v in states[1].values():
        v.copy_(v * 0.9)
    made = 0
    for _ in range(5):
        before = made
        for state in states:
            close(functional_call(fused, state, (x,)), functional_call(eager, state, (x,)))
        made += folds()
    assert made == before == 2 * CONVOLUTIONS, "the second ones wait until it is seen that they come again"


@torch.no_grad()
def test_weights_that_are_new_at_each_call_are_not_folded(folds: Callable[[], int]) -> None:
    """By functional_call, by load_state_dict(assign=True), or in a copy: folding would take longer than the call."""
    eager, fused, x = twins()
    new = lambda: {k: v.detach().clone() for k, v in eager.state_dict().items()}  # noqa: E731
    calls = (
        lambda: functional_call(fused, new(), (x,)),
        lambda: fused.load_state_dict(new(), assign=True) and fused(x),
        lambda: copy.deepcopy(fused)(x),
    )
    expected = eager(x)
    for call in calls:
        for _ in range(3):
            call()
        folds()
        for _ in range(cache.PAYS):
            close(call(), expected)
        assert folds() <= CONVOLUTIONS  # once, in a row of calls at the most


@torch.no_grad()
def test_a_move_to_where_the_model_is_changes_nothing(folds: Callable[[], int]) -> None:
    _, fused, x = twins()
    fused(x)
    folds()
    for _ in range(3):
        fused.to(DEVICE).float()(x)
    assert folds() == 0
    fused.half().float()(x)
    fused(x)
    assert folds() == CONVOLUTIONS


@torch.no_grad()
def test_weights_that_do_not_count_their_changes_run_unfolded(folds: Callable[[], int]) -> None:
    with torch.inference_mode():
        eager, fused, x = twins()
        for _ in range(2):
            close(fused(x), eager(x))
        eager.conv1.weight.mul_(2), fused.conv1.weight.mul_(2)
        close(fused(x), eager(x))
    assert folds() == 0


@pytest.mark.parametrize("fused_step", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_optimizers_are_seen(kind: type[torch.optim.Optimizer], fused_step: bool) -> None:
    eager, fused, x = twins()
    optimizers = [kind(m.parameters(), lr=1e-3, fused=fused_step) for m in (eager, fused)]
    for _ in range(3):
        with torch.no_grad():
            close(fused(x), eager(x))
        for model, optimizer in zip((eager, fused), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        for p, q in zip(eager.parameters(), fused.parameters(), strict=True):
            q.data.copy_(p.data)  # gradients differ in their last bits, which Adam makes steps of
        refresh(fused)
        with torch.no_grad():
            close(fused(x), eager(x))


@torch.no_grad()
def test_an_optimizer_of_another_model_changes_nothing(folds: Callable[[], int]) -> None:
    _, fused, x = twins()
    other = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), 0.1, fused=True)
    fused(x)
    folds()
    with torch.enable_grad():
        other(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    fused(x)
    assert folds() == 0


def all_of(weights: Tensor) -> None:
    weights.data.mul_(0.5)


def by_a_vector(model: nn.Module) -> None:
    parameters = list(model.to(memory_format=torch.contiguous_format).parameters())
    vector = parameters_to_vector(parameters)
    vector_to_parameters(vector, parameters)
    model(torch.randn(1, 3, 32, 32))
    vector_to_parameters(vector.mul_(0.9), parameters)  # the same memory, which another tensor's counter tells of


def by_batch_norm(model: nn.Module) -> None:
    bn = model.layer2[0].bn1
    F.batch_norm(torch.ones(2, 128, 2, 2), bn.running_mean, bn.running_var, training=True, momentum=0.5)


SEEN_AT_A_GLANCE: dict[str, Callable[[nn.Module], None]] = {
    "data": lambda model: all_of(model.conv1.weight),
    "numpy": lambda model: model.layer1[0].bn1.bias.detach().numpy().__iadd__(0.5),
    "vector_to_parameters": by_a_vector,
    "batch_norm": by_batch_norm,
}


@pytest.mark.skipif(DEVICE == "cuda", reason="the processor's memory is looked at")
@pytest.mark.parametrize("how", SEEN_AT_A_GLANCE)
@torch.no_grad()
def test_what_changes_a_tensors_first_values_is_seen(how: str) -> None:
    eager, fused, x = twins()
    before = fused(x)
    for model in (eager, fused):
        SEEN_AT_A_GLANCE[how](model)
    close(fused(x), eager(x))
    assert (eager(x) - before).abs().max() > 0.01, "the change shows nowhere"


@pytest.mark.skipif(DEVICE == "cuda", reason="memory of NumPy's is at the same address again")
@torch.no_grad()
def test_memory_that_is_another_tensors_by_now_is_read_again() -> None:
    """Weights that were folded are gone, and new ones lie where they lay, with the same first values."""
    eager, fused, x = twins()
    weight, their_weight = fused.layer1[0].conv2.weight, eager.layer1[0].conv2.weight
    memory = weight.detach().contiguous().numpy().copy()
    weight.data = torch.from_numpy(memory)
    for _ in range(20):
        fused(x)
    weight.data = weight.data * 2
    fused(x)
    memory[1:] *= 3
    weight.data, their_weight.data = torch.from_numpy(memory), torch.from_numpy(memory.copy())
    close(fused(x), eager(x))


@pytest.mark.parametrize("fuses", [False, True])
def test_an_optimizer_of_the_same_memory_is_seen(fuses: bool) -> None:
    """Its parameters are other objects than the model's, with counters of their own."""
    trained, fused, x = twins()
    optimizer = torch.optim.SGD(trained.parameters(), 1.0, fused=fuses)
    for p, q in zip(trained.parameters(), fused.parameters(), strict=True):
        q.data, p.grad = p.data, torch.full_like(p, 0.01)
        p.grad[:4] = 0  # what a glance would show
    outs: list[Tensor] = []
    with torch.no_grad():
        optimizer.register_step_post_hook(lambda *_: outs.append(fused(x)))  # called before PyTorch's global hooks
        before = fused(x)
        optimizer.step()
        for out in (*outs, fused(x)):
            close(out, trained(x))
            assert (out - before).abs().max() > 0.01


def halve(weight: Tensor) -> None:
    with torch.no_grad():
        weight[1:].mul_(0.5)


@pytest.mark.skipif(DEVICE == "cuda", reason="memory of the processor's")
@torch.no_grad()
def test_what_another_process_writes_is_found_and_refreshed() -> None:
    """Its version counters are its own."""
    eager, fused, x = twins()
    fused.share_memory()
    before = fused(x)
    halve(eager.conv1.weight)
    other = torch.multiprocessing.get_context("spawn").Process(target=halve, args=(fused.conv1.weight,))
    other.start()
    other.join(60)
    assert other.exitcode == 0 and torch.equal(fused.conv1.weight, eager.conv1.weight)
    assert torch.equal(fused(x), before), "seen, and need not be documented"
    with detect_stale_weights(), pytest.raises(StaleWeightsError):
        fused(x)
    close(refresh(fused)(x), eager(x))


@torch.no_grad()
def test_detection_is_a_switch_too() -> None:
    _, fused, x = twins()
    fused(x)
    fused.layer1[0].conv1.weight.data[1:].mul_(0.5)  # the first values stay, on which a glance is thrown at every call
    detect_stale_weights(True)
    try:
        with pytest.raises(StaleWeightsError):
            fused(x)
    finally:
        detect_stale_weights(False)
    fused(x)


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_threads_that_set_the_mode_and_call(name: str) -> None:
    eager, fused, _ = twins(name)
    inputs = [torch.randn(1 + i % 2, 3, 64, 64, device=DEVICE) for i in range(4)]
    start = threading.Barrier(4, timeout=60)
    with torch.no_grad():
        expected = [eager(x) for x in inputs]

    def run(i: int) -> list[Tensor]:
        start.wait()
        with torch.no_grad():
            return [fused.eval()(inputs[i]) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for found, true in zip(pool.map(run, range(4)), expected, strict=True):
            for out in found:
                close(out, true)


def test_threads_while_another_changes_weights() -> None:
    """Each result is of the weights before a change or behind it, within a block."""
    _, fused, x = twins()
    stop = threading.Event()

    def change() -> None:
        with torch.no_grad():
            while not stop.is_set():
                fused.layer1[0].bn1.bias.add_(0)  # the same numbers, told as changed
                fused.eval()

    changer = threading.Thread(target=change)
    with torch.no_grad():
        expected = fused(x)
        changer.start()
        try:
            for _ in range(30):
                out = fused(x)
                assert out.shape == expected.shape and out.isfinite().all()
        finally:
            stop.set()
            changer.join()
        close(fused.eval()(x), expected)


def _forward_in_a_child(model: nn.Module, x: Tensor, results: object) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        model.conv1.weight.mul_(0.5)
        model.layer1[0].conv1.weight.mul_(0.5)
        results.put(model(x).sum().item())  # type: ignore[attr-defined]


@pytest.mark.skipif(DEVICE == "cuda", reason="CUDA cannot be used in a forked process")
def test_a_forked_child_folds_though_a_thread_of_its_parent_was_folding() -> None:
    _, fused, x = twins()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    stop = threading.Event()

    def fold_all_the_time() -> None:
        with torch.no_grad():
            while not stop.is_set():
                for module in fused.modules():
                    if isinstance(module, FusedModule):
                        module._fused_owner.forms = ()
                fused(x)

    folding = threading.Thread(target=fold_all_the_time)
    folding.start()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    try:
        children = [context.Process(target=_forward_in_a_child, args=(fused, x, results)) for _ in range(6)]
        for child in children:
            child.start()
        found = [results.get(timeout=120) for _ in children]
        for child in children:
            child.join(60)
            assert child.exitcode == 0
    finally:
        stop.set()
        folding.join()
    assert max(found) - min(found) < 1e-2


def folded_tensors(model: nn.Module) -> list[weakref.ref[Tensor]]:
    forms = [form for m in model.modules() if isinstance(m, FusedModule) for form in m._fused_owner.forms]
    return [weakref.ref(t) for form in forms for t in cache.tensors(form.value)]


FREEING: dict[str, Callable[[nn.Module], object]] = {
    "meta": lambda m: m.to("meta"),
    "bfloat16": lambda m: m.bfloat16(),
    **({"share_memory": lambda m: m.share_memory()} if DEVICE == "cpu" else {}),  # a GPU's weights stay as they are
    "unfuse_": unfuse_,
}


@pytest.mark.parametrize("how", [*FREEING, "del"])
@torch.no_grad()
def test_memory_is_freed_when_the_weights_go(how: str) -> None:
    """At once, as eager's is: there is no cycle that waits for the garbage collector."""
    _, fused, x = twins()
    fused(x), fused(x)
    held = folded_tensors(fused)
    weights = [weakref.ref(p) for p in fused.parameters()]
    assert held and all(ref() is not None for ref in held)
    gc.collect()
    gc.disable()
    try:
        if how == "del":
            del fused
            assert all(ref() is None for ref in weights)
        else:
            FREEING[how](fused)
        assert all(ref() is None for ref in held)
    finally:
        gc.enable()


def test_what_a_graph_reads_takes_new_tensors_and_new_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(cuda_stream=0, record_event=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    weight = torch.randn(3)
    kind = (None, torch.float32, torch.device("cpu"))
    old, new = (cache.Form(kind, (), [weight]) for _ in range(2))
    old.fill((torch.zeros(3), {"ceil_mode": False}), None)
    old.captured = True
    memory = old.value[0]
    new.fill((weight, {"ceil_mode": True}), old)
    assert new.captured and new.value[0] is memory and torch.equal(memory, weight) and new.value[1]["ceil_mode"]


class Interrupted(BaseException):
    pass


@torch.no_grad()
def test_a_first_look_that_is_interrupted_leaves_nothing_behind() -> None:
    eager, fused, x = twins()
    block = fused.layer1[0]
    with mock.patch.object(type(block), "fused_pairs", side_effect=Interrupted), pytest.raises(Interrupted):
        fused(x)
    close(fused(x), eager(x))
    assert block._fused_owner.known.problem is None and fused.layer1._fused_owner.known.problem is None


@torch.no_grad()
def test_threads_that_look_for_the_first_time_at_once() -> None:
    """What one of them has not finished the others do not see."""
    seen: list[Tensor] = []
    for name in ("resnet18", "googlenet"):
        eager, fused, x = twins(name)
        blocks = [m for m in fused.modules() if isinstance(m, FusedModule)]
        # GoogLeNet's network itself, and on a GPU its first convolution, is not asked what it is.
        first = fused if name == "resnet18" else fused.inception3a
        original = FusedModule._fused_understand

        def looking(block: FusedModule, watched: str | None, original: Any = original, x: Tensor = x) -> Any:
            found = original(block, watched)
            if block is first and threading.current_thread() is threading.main_thread():  # noqa: B023
                other = threading.Thread(target=lambda: seen.append(fused(x)))  # noqa: B023
                with torch.no_grad():
                    other.start()
                    other.join(60)
            return found

        with mock.patch.object(FusedModule, "_fused_understand", looking):
            close(fused(x), eager(x))
        close(seen[-1], eager(x))
        assert all(b._fused_owner.known is None or b._fused_owner.known.problem is None for b in blocks)


def test_optimizers_under_torch_func_and_in_compiled_graphs() -> None:
    """Neither is anything to a fused model that stands beside; what a compiled step does to one's own is seen."""
    eager, fused, x = twins()
    with torch.no_grad():
        fused(x)

    def stepped(w: Tensor) -> Tensor:
        mine = w.detach().clone()
        mine.grad = torch.ones_like(mine)
        torch.optim.SGD([mine], lr=0.1).step()
        return (mine**2).sum()

    torch.testing.assert_close(vmap(stepped)(torch.ones(2, 3)), torch.full((2,), 3 * 0.9**2))
    for options in ({"foreach": True}, {"fused": True}):
        for model in (eager, fused):
            optimizer = torch.optim.SGD(model.layer1.parameters(), lr=0.1, **options)
            for p in model.layer1.parameters():
                p.grad = torch.full_like(p, 0.5)
            (optimizer.step if model is eager else torch.compile(optimizer.step, backend="aot_eager"))()
        with torch.no_grad():
            close(fused(x), eager(x))


def test_copies_of_what_was_compiled_or_parametrized_are_their_own() -> None:
    _, fused, x = twins()
    block = fused.layer1[1]
    block.own = nn.Parameter(torch.ones(3))
    nn.utils.parametrize.register_parametrization(block, "own", nn.Identity())
    fused.layer2[1].compile(backend="eager")
    with torch.no_grad():
        before = fused(x)
        for part in ("layer1.1", "layer2.1"):
            other = copy.deepcopy(fused)
            for p in other.get_submodule(part).parameters():
                p.mul_(1.5)
            assert (other(x) - before).abs().max() > 0.01
            close(fused(x), before)
    nn.utils.parametrize.remove_parametrizations(block, "own")
    assert isinstance(pickle.loads(pickle.dumps(fused)).layer1[1], type(block))


def test_fused_modules_have_their_classes_names() -> None:
    eager, fused, _ = twins("googlenet")
    names = [[(type(m).__name__, type(m).__qualname__) for m in model.modules()] for model in (eager, fused)]
    assert names[0] == names[1]
    assert "FusedInception" in repr(fused) and "FusedInception" not in repr(unfuse_(fused))


def test_a_copy_is_of_the_same_class_and_folds_for_itself() -> None:
    eager, fused, x = twins("googlenet")
    with torch.no_grad():
        fused(x)
        other = copy.deepcopy(fused)
        assert type(other) is type(fused)
        assert [type(m) for m in other.modules()] == [type(m) for m in fused.modules()]
        assert type(copy.deepcopy(fused.inception3a)) is type(fused.inception3a)
        shallow = copy.copy(fused.inception3a)
        shallow.branch1.conv.weight.mul_(2)
        eager.inception3a.branch1.conv.weight.mul_(2)
        close(fused(x), eager(x))


@torch.no_grad()
def test_replicas_of_data_parallel_run_their_own_weights(folds: Callable[[], int]) -> None:
    """As torch.nn.parallel.replicate makes them: parameters are plain attributes, copies that change at every call."""
    eager, fused, _ = twins()
    block, twin = fused.layer1[0], eager.layer1[0]
    y = torch.randn(2, 64, 16, 16, device=DEVICE)
    close(block(y), twin(y))
    folds()
    replica = block._replicate_for_data_parallel()
    for name, child in block.named_children():
        copied = child._replicate_for_data_parallel()
        for key, parameter in child._parameters.items():
            if parameter is None:
                copied._parameters[key] = None
            else:
                setattr(copied, key, parameter * 2)
        for key, buffer in child.named_buffers(recurse=False):
            copied._buffers[key] = buffer.clone()
        replica._modules[name] = copied
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    for _ in range(2):
        close(replica(y), twin(y))
    assert folds() == 0 and block._fused_owner is not replica._fused_owner


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "jvp": lambda m, x: jvp(m, (x,), (torch.ones_like(x),)),
    "jvp of weights": lambda m, x: jvp(
        lambda p: functional_call(m, p, (x,)),
        (dict(m.named_parameters()),),
        ({k: torch.ones_like(p) for k, p in m.named_parameters()},),
    ),
    "per-sample gradients": lambda m, x: vmap(
        grad(lambda p, one: functional_call(m, p, (one[None],)).square().mean()), in_dims=(None, 0)
    )({k: p.detach() for k, p in m.named_parameters()}, x),
    "vmap": lambda m, x: vmap(lambda one: m(one[None])[0])(x),
    "jacrev": lambda m, x: jacrev(lambda y: m(y)[:, :4])(x),
    "ensemble": lambda m, x: vmap(lambda p, b: functional_call(m, (p, b), (x,)))(*stack_module_state([m, m])),
    "hessian-vector": lambda m, x: jvp(grad(lambda y: m(y).square().mean()), (x,), (torch.ones_like(x),)),
}


def dual(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    import torch.autograd.forward_ad as fw

    with fw.dual_level():
        primal, tangent = fw.unpack_dual(model(fw.make_dual(x, torch.ones_like(x))))
        assert tangent is not None
        return primal, tangent


@pytest.mark.parametrize("how", [*TRANSFORMS, "dual numbers"])
@pytest.mark.parametrize("grad_mode", [False, True])
def test_transforms_give_what_eager_gives(how: str, grad_mode: bool) -> None:
    eager, fused, _ = twins(num_classes=6)
    x = torch.randn(2, 3, 32, 32, device=DEVICE)
    with torch.set_grad_enabled(grad_mode):
        fused(x)  # folded weights are at hand
        function = TRANSFORMS.get(how, dual)
        try:
            theirs = function(eager, x)
        except RuntimeError as error:
            pytest.skip(f"eager PyTorch cannot: {error}")
        mine = function(fused, x)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)  # reason: as close()


def test_mixed_dtypes_are_refused_by_name() -> None:
    _, fused, x = twins()
    for train in (False, True):
        with torch.set_grad_enabled(train), pytest.raises(TypeError) as error:
            fused.train(train)(x.half())
        assert "the input is torch.float16, but conv1.weight is torch.float32" in str(error.value)
    _, googlenet, x = twins("googlenet")
    # On a GPU the network runs its first convolution with the pool behind it.
    who = (
        "BasicConv2d: the input is torch.bfloat16, but"
        if DEVICE == "cpu"
        else "GoogLeNet: the input is torch.bfloat16, but conv1."
    )
    with pytest.raises(TypeError, match=rf"{who} ?conv.weight is torch.float32"):
        googlenet(x.bfloat16())


def test_a_report_that_is_taken_for_the_model_says_so() -> None:
    report = fuse_(tv("resnet18"))
    for mistake in (
        lambda: report(torch.zeros(1)),
        lambda: report.eval(),
        lambda: report.parameters(),
        lambda: report.to("cpu"),
        lambda: report.state_dict(),
    ):
        with pytest.raises((TypeError, AttributeError), match="fuse_ changes the model in place and returns a report"):
            mistake()
    assert copy.deepcopy(report) == report


def test_the_native_comparison_and_pythons_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is changed, and back: the native one is the same question asked faster."""
    assert snapshot.unchanged is not None, "the native library does not find its way"
    _, fused, _ = twins()
    block = fused.layer2[0]
    taken = Snapshot(block, block.fused_skipped(), block._fused_methods(), list(block.parameters()))
    weight, relu = block.conv1.weight, block.relu
    hook = lambda *args: None  # noqa: E731
    changes: list[tuple[Callable[[], object], Callable[[], object] | None]] = [
        (lambda: setattr(block, "relu", nn.ReLU()), lambda: setattr(block, "relu", relu)),
        (lambda: setattr(block.bn1, "training", True), lambda: setattr(block.bn1, "training", False)),
        (lambda: setattr(block.conv1, "forward", hook), lambda: delattr(block.conv1, "forward")),
        (lambda: relu._forward_hooks.__setitem__(0, hook), lambda: relu._forward_hooks.pop(0)),
        (lambda: setattr(block, "backend", "triton"), lambda: setattr(block, "backend", None)),
        (
            lambda: block.conv1._parameters.__setitem__("weight", nn.Parameter(weight.clone())),
            lambda: block.conv1._parameters.__setitem__("weight", weight),
        ),
        (
            lambda: setattr(block.bn2, "__class__", nn.SyncBatchNorm),
            lambda: setattr(block.bn2, "__class__", nn.BatchNorm2d),
        ),
        (lambda: setattr(nn.ReLU, "forward", hook), lambda: setattr(nn.ReLU, "forward", forward)),
        (lambda: cache.mark_stale([]), lambda: None),
        # Elsewhere in the dictionary, and under another string of the same letters, as an unpickled module has it.
        (lambda: moved(vars(block.conv1), "stride"), lambda: moved(vars(block.conv1), "padding")),
        (lambda: moved(vars(block.conv1), "stride", 2), lambda: moved(vars(block.conv1), "stride", stride)),
        # Attributes that come and go, and such as would be found before what is recorded, behind them.
        (lambda: setattr(block.bn1, "note", 1), lambda: delattr(block.bn1, "note")),
        (lambda: vars(block.bn1).update(note=1, weight=2), lambda: vars(block.bn1).pop("weight")),
        (lambda: vars(block.bn1).pop("note"), lambda: None),
        (lambda: vars(block).update(relu=hook), lambda: vars(block).pop("relu")),
        (lambda: setattr(weight, "data", weight.data.transpose(2, 3)), lambda: setattr(weight, "data", data)),
        (lambda: setattr(weight, "data", weight.data.clone()), None),
    ]
    forward, stride, data = nn.ReLU.forward, block.conv1.stride, weight.data

    def moved(table: dict[str, object], name: str, *value: object) -> None:
        old = table.pop(name)
        table["".join(name)] = value[0] if value else old

    for i, (change, back) in enumerate(changes):
        same = i in (8, 9, 11, 13)
        change()
        assert taken.holds(block) == taken._holds(block) == same, i
        if back is not None:
            back()
            assert taken.holds(block) and taken._holds(block), i
    monkeypatch.setattr(snapshot, "unchanged", None)
    eager, fused, x = twins()
    with torch.no_grad():
        close(fused(x), eager(x))
        for model in (eager, fused):
            model.layer1[0].relu = nn.Identity()
            model.layer3[0].bn1.bias.add_(1)
        close(fused(x), eager(x))


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo")
@torch.no_grad()
def test_sharded_weights_that_are_gathered_for_each_call_are_read(tmp_path: object) -> None:
    """fully_shard gathers parameters into the same memory for each call, and no version counter tells."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    eager, fused, x = twins()
    fused.to(memory_format=torch.contiguous_format)  # fully_shard takes no other
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for block in (*fused.layer1, *fused.layer2):
            fully_shard(block)
        fully_shard(fused)
        for turn in range(5):
            for _ in range(3):
                close(fused(x), eager(x))
            if turn % 2 == 0:
                fused.reshard()
            for mine, theirs in zip(fused.parameters(), eager.parameters(), strict=True):
                theirs.mul_(0.9)
                getattr(mine, "to_local", mine.detach)().copy_(theirs)
        # Whether the memory is the same again is the allocator's: nothing may be kept, be it found stale or not.
        assert not any(m._fused_owner.forms for m in fused.modules() if isinstance(m, FusedModule))
        with pytest.raises(ValueError, match="unfuse_: a ResNet has become a FSDPResNet since fuse_"):
            unfuse_(fused)
    finally:
        dist.destroy_process_group()


def test_names_that_users_need_are_public() -> None:
    for name in ("refresh", "detect_stale_weights", "StaleWeightsError"):
        assert name in fused_cnn.__all__
