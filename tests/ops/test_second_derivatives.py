"""What PyTorch takes apart in a backward: gradients that are differentiated again, on every way to ask for that, and
gradients in a batch, of every op and of fused networks; there the kernels' gradients must be PyTorch's own operations,
and nowhere else."""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import DEVICE
from functorch.compile import make_boxed_func
from test_fuse import lively
from test_transforms import PROBLEMS, VECTOR, C, Problem, X, batch_norm, seeded
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import functional, grad, gradcheck, gradgradcheck
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet
from torchvision.models.googlenet import Inception

from fused_cnn import _library, fuse_, ops
from fused_cnn.ops import BatchNormArgs

BACKEND = "native" if DEVICE == "cpu" else None  # on a GPU float64 may have no kernels
WITH_OPTIONS = {
    "conv_bias_relu, linear with residual": Problem(
        lambda x, w, r, backend: ops.conv_bias_relu(x, w, None, r, relu=False, backend=backend),
        (X, (4, C, 1, 1), (2, 4, 5, 5)),
    ),
    "concat_bias_relu, linear": Problem(
        lambda x, y, b, backend: ops.concat_bias_relu([x, y], b, relu=False, backend=backend), (X, X, (2 * C,))
    ),
    "concat_bias_relu, no bias": Problem(lambda x, y, backend: ops.concat_bias_relu([x, y], backend=backend), (X, X)),
    "bn_relu, linear": Problem(
        lambda x, w, b, backend: ops.bn_relu(x, batch_norm(w, b, True), relu=False, backend=backend),
        (X, VECTOR, VECTOR),
    ),
    "bn_relu, not affine": Problem(
        lambda x, backend: ops.bn_relu(x, BatchNormArgs(None, None, None, None, True), backend=backend), (X,)
    ),
    "bn_relu_concat, one frozen": Problem(
        lambda x, w, b, y, v, c, backend: ops.bn_relu_concat(
            [x, y], [batch_norm(w, b, True), batch_norm(v, c, False)], backend=backend
        ),
        (X, VECTOR, VECTOR, X, VECTOR, VECTOR),
    ),
    "bn_add_relu, one frozen": Problem(
        lambda x, w, b, r, v, c, backend: ops.bn_add_relu(
            x, batch_norm(w, b, False), r, batch_norm(v, c, True), backend=backend
        ),
        (X, VECTOR, VECTOR, X, VECTOR, VECTOR),
    ),
    "bn_relu_conv, in groups without bias": Problem(
        lambda x, w, b, weight, backend: ops.bn_relu_conv(
            x, batch_norm(w, b, True), weight, stride=2, dilation=2, groups=C, backend=backend
        ),
        (X, VECTOR, VECTOR, (2 * C, 1, 2, 2)),
    ),
}
EVERY = {**PROBLEMS, **WITH_OPTIONS}
each_problem = pytest.mark.parametrize("name", EVERY)
# The same formulas in float64, summed in another order than the reference's.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}

Op = Callable[..., Tensor]


def op(name: str, backend: str | None = BACKEND) -> Op:
    return lambda *leaves: EVERY[name].call(*leaves, backend=backend)


def leaves(name: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [t.requires_grad_() for t in seeded(EVERY[name].shapes, dtype=dtype)]


def none_is_zero(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, like, strict=True)]


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, **CLOSE)


@each_problem
def test_gradients_of_gradients_are_the_numerical_ones(name: str) -> None:
    assert gradgradcheck(op(name), leaves(name))


@each_problem
def test_gradients_in_a_batch_are_those_one_by_one(name: str) -> None:
    assert gradcheck(op(name), leaves(name), check_batched_grad=True)


@pytest.mark.parametrize("name", ["bn_relu, training", "bn_add_relu with two, training", "bn_relu_conv, training"])
def test_third_derivatives_see_the_statistics_of_the_batch(name: str) -> None:
    """PyTorch's own BatchNorm does not, so that the numerical ones are the truth."""

    def gradients(*given: Tensor) -> tuple[Tensor, ...]:
        own = [t.view_as(t) for t in given]
        return grad(op(name)(*own).pow(3).sum(), own, create_graph=True)

    # On one random direction of inputs and outputs each.
    assert gradgradcheck(gradients, leaves(name), fast_mode=True)


def loss_with_penalty(f: Op, given: Sequence[Tensor], on: Sequence[Tensor]) -> Tensor:
    """What GANs and contractive networks are trained with: a loss, and the square of its gradient by `on`."""
    loss = f(*given).square().sum()
    return loss + sum(g.square().sum() for g in grad(loss, on, create_graph=True))


def by_grad(f: Op, given: list[Tensor]) -> list[Tensor | None]:
    return list(grad(loss_with_penalty(f, given, given), given))


def by_backward(f: Op, given: list[Tensor]) -> list[Tensor | None]:
    loss_with_penalty(f, given, given).backward()
    return [t.grad for t in given]


def by_backward_of_inputs(f: Op, given: list[Tensor]) -> list[Tensor | None]:
    loss_with_penalty(f, given, given[:1]).backward(inputs=given)
    return [t.grad for t in given]


def of_the_last_alone(f: Op, given: list[Tensor]) -> list[Tensor | None]:
    return list(grad(loss_with_penalty(f, given, given[-1:]), given[-1:]))


def alone(f: Op, given: list[Tensor]) -> list[Tensor | None]:
    """A penalty without the loss, where the gradient from above is constant."""
    found = grad(f(*given).sum(), given, create_graph=True)
    penalty = sum((g.square().sum() for g in found), given[0].square().sum())
    return none_is_zero(grad(penalty, given, allow_unused=True), given)


def of_one_after_the_other(f: Op, given: list[Tensor]) -> list[Tensor | None]:
    """Where one argument alone needs a gradient."""
    found = []
    for i, t in enumerate(given):
        constant = [t if j == i else t.detach() for j, t in enumerate(given)]
        found += grad(loss_with_penalty(f, constant, [t]), t)
    return found


def square_sum(f: Op) -> Op:
    return lambda *t: f(*t).square().sum()


def after_a_step(f: Op, given: list[Tensor]) -> list[Tensor]:
    """MAML's outer gradient (arXiv 1703.03400), through one step of the inner descent."""
    inner = grad(f(*given).square().sum(), given, create_graph=True)
    return list(grad(f(*(t - 0.01 * g for t, g in zip(given, inner, strict=True))).square().sum(), given))


def jacobians(f: Op, given: list[Tensor], **options: bool) -> list[Tensor]:
    return list(functional.jacobian(lambda *t: f(*t).square().sum((0, 2, 3)), tuple(given), **options))


WAYS: dict[str, Callable[[Op, list[Tensor]], Any]] = {
    "grad": by_grad,
    "backward": by_backward,
    "backward(inputs)": by_backward_of_inputs,
    "one leaf": of_the_last_alone,
    "no loss": alone,
    "partial": of_one_after_the_other,
    "checkpoint": lambda f, given: by_grad(lambda *t: checkpoint(f, *t, use_reentrant=False), given),
    "MAML": after_a_step,
    "hvp": lambda f, given: functional.hvp(square_sum(f), tuple(given), tuple(given))[1],
    "vhp": lambda f, given: functional.vhp(square_sum(f), tuple(given), tuple(given))[1],
    "jvp": lambda f, given: functional.jvp(f, tuple(given), tuple(given))[1],
    "hessian": lambda f, given: functional.hessian(lambda t: square_sum(f)(*given[:-1], t), given[-1]),
    "jacobian": jacobians,
    "jacobian in a batch": lambda f, given: jacobians(f, given, vectorize=True),
    "jacobian in a batch, with history": lambda f, given: jacobians(f, given, vectorize=True, create_graph=True),
    "grads in a batch": lambda f, given: grad(
        f(*given), given, torch.stack([torch.ones_like(f(*given)), f(*given).detach()]), is_grads_batched=True
    ),
}


@pytest.mark.parametrize("way", WAYS)
@each_problem
def test_every_way_gives_what_the_reference_gives(name: str, way: str) -> None:
    found, expected = (WAYS[way](op(name, backend), leaves(name)) for backend in (BACKEND, "reference"))
    assert any(t.abs().max() > 0 for t in expected)
    close(found, expected)


@each_problem
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_history_changes_no_gradient(name: str, dtype: torch.dtype) -> None:
    """Nor its dtype, where autocast is on around the backward alone."""
    given = leaves(name, dtype)
    loss = op(name)(*given).float().square().sum()
    # Two roundings of a 16-bit gradient where the kernel has one, and convolutions' sums of some hundred products.
    bound = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    expected = grad(loss, given, retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = grad(loss, given, create_graph=True)
    torch.testing.assert_close(found, expected, **bound)


@pytest.mark.parametrize("channels", [3, 8, 19])
def test_relus_bits_and_nan_are_read_as_the_kernels_read_them(channels: int) -> None:
    """Nine bits take two bytes; ReLU passes NaN, and the gradient where its result is NaN."""
    x, residual = torch.randn(2, 2, channels, 3, 5, device=DEVICE, dtype=torch.float64).unbind()
    residual[0, 1, 1, 1:3] = torch.tensor([torch.nan, -torch.inf])
    for t in (x, residual):
        t.requires_grad_()
    bn = BatchNormArgs(None, None, torch.zeros_like(x[0, :, 0, 0]), torch.ones_like(x[0, :, 0, 0]), False)
    for out in (
        ops.bn_add_relu(x, bn, residual, backend=BACKEND),
        ops.bn_add_relu(x, bn, residual, bn, backend=BACKEND),
        ops.add_relu(x, residual, backend=BACKEND),
        ops.concat_bias_relu([residual, x], backend=BACKEND),
        ops.bn_relu_concat([residual, x], [bn, bn], backend=BACKEND),
    ):
        seed = torch.randn_like(out)
        plain = grad(out, (x, residual), seed, retain_graph=True)
        assert plain[1].detach()[0, 1, 1, 1] != 0
        torch.testing.assert_close(grad(out, (x, residual), seed, create_graph=True), plain)


def test_running_statistics_are_updated_once() -> None:
    x, weight, bias = leaves("bn_relu, training")
    kernel = torch.randn(2, C, 1, 1, dtype=x.dtype, device=DEVICE, requires_grad=True)
    mean, var = torch.zeros_like(weight).detach(), torch.ones_like(weight).detach()
    bn = BatchNormArgs(weight, bias, mean, var, True)
    for call in (
        lambda: ops.bn_relu(x, bn),
        lambda: ops.bn_add_relu(x, bn, x),
        lambda: ops.bn_add_relu(x, bn, x, bn),
        lambda: ops.bn_relu_conv(x, bn, kernel),
    ):
        loss = call().square().sum()
        after = mean.clone(), var.clone()
        (found,) = grad(loss, x, create_graph=True)
        found.square().sum().backward()
        assert torch.equal(mean, after[0]) and torch.equal(var, after[1])


@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch(training: bool) -> None:
    x = torch.zeros(0, C, 5, 5, device=DEVICE, requires_grad=True)
    weight, bias = (torch.ones(C, device=DEVICE, requires_grad=True) for _ in range(2))
    bn = BatchNormArgs(weight, bias, torch.zeros(C, device=DEVICE), torch.ones(C, device=DEVICE), training)
    kernel = torch.ones(2, C, 1, 1, device=DEVICE, requires_grad=True)
    for call in (
        lambda: ops.bn_relu(x, bn),
        lambda: ops.bn_add_relu(x, bn, x),
        lambda: ops.bn_add_relu(x, bn, x, bn),
        lambda: ops.bn_relu_conv(x, bn, kernel),
        lambda: ops.conv_bias_relu(x, kernel),
    ):
        given = (x, weight, bias, kernel)
        found = grad(call().square().sum(), given, create_graph=True, allow_unused=True)
        again = grad(sum(g.square().sum() for g in found if g is not None), given, allow_unused=True)
        assert all(not g.any() for g in (*found, *again) if g is not None)


def backward_kernels(name: str) -> set[str]:
    """The kernels that an op's backward runs."""
    if name.startswith("bn_"):
        return {"bn_add_relu_bwd" if "add" in name else "bn_relu_concat_bwd"}
    if "concat" in name or "add" in name:
        return {f"{name.partition(',')[0]}_bwd"}
    return {"max_pool2d_bwd" if "pool" in name else "conv_bias_relu_bwd"}


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU libraries run some of the ops")
@each_problem
def test_an_ordinary_backward_runs_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, ran = leaves(name, torch.float32), set()

    def watched(key: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            ran.add(key)
            return kernel(*args)

        return call

    for (key, backend), kernel in list(_library._kernels.items()):
        monkeypatch.setitem(_library._kernels, (key, backend), watched(key, kernel))
    out = op(name)(*given)
    ran.clear()
    grad(out.sum(), given, create_graph=True)
    assert not ran
    grad(out.sum(), given)
    assert ran >= backward_kernels(name)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU libraries run some of the ops")
@each_problem
def test_a_compiled_backward_holds_kernels_and_refuses_a_second_one(name: str) -> None:
    given, held = leaves(name, torch.float32), set()

    def compile_backward(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        held.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph), bw_compiler=compile_backward)
    out = torch.compile(op(name), fullgraph=True, backend=backend)(*given)
    close_to = {"rtol": 1e-4, "atol": 1e-4}  # float32
    torch.testing.assert_close(
        grad(out.sum(), given, retain_graph=True), grad(op(name)(*given).sum(), given), **close_to
    )
    assert held >= {f"fused_cnn.{key}.default" for key in backward_kernels(name)}
    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):
        grad(sum(g.square().sum() for g in grad(out.square().sum(), given, create_graph=True)), given)


def blocks(block: type[resnet.BasicBlock] | type[resnet.Bottleneck]) -> nn.Module:
    """One with a plain shortcut, one with a projection."""
    planes, wide = 8 // block.expansion, 16 // block.expansion
    projection = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    return nn.Sequential(nn.Conv2d(3, 8, 1), block(8, planes), block(8, wide, 2, projection))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "basic blocks": lambda: blocks(resnet.BasicBlock),
    "bottlenecks": lambda: blocks(resnet.Bottleneck),
    "inception": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Inception(8, 4, 4, 8, 4, 4, 4), nn.MaxPool2d(2)),
    "resnet": lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4),
}


def network_by_grad(model: nn.Module, x: Tensor) -> Any:
    out = model(x).square().sum()
    (g,) = grad(out, x, create_graph=True)
    return grad(out + g.square().sum(), list(model.parameters()))


def network_by_backward(model: nn.Module, x: Tensor, **inputs: Any) -> Any:
    out = model(x).square().sum()
    (g,) = grad(out, x, create_graph=True)
    (out + g.square().sum()).backward(**inputs)
    return [p.grad for p in model.parameters()]


def network_after_a_step(model: nn.Module, x: Tensor) -> Any:
    parameters = dict(model.named_parameters())
    inner = grad(model(x).square().mean(), list(parameters.values()), create_graph=True)
    fast = {k: p - 0.05 * g for (k, p), g in zip(parameters.items(), inner, strict=True)}
    return grad(functional_call(model, fast, (0.7 * x,)).square().mean(), list(parameters.values()))


NETWORK_WAYS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": network_by_grad,
    "backward": network_by_backward,
    "backward(inputs)": lambda model, x: network_by_backward(model, x, inputs=list(model.parameters())),
    "MAML": network_after_a_step,
    "hvp": lambda model, x: functional.hvp(lambda t: model(t).square().sum(), x, torch.ones_like(x))[1],
    "jvp": lambda model, x: functional.jvp(model, x, torch.ones_like(x))[1],
    "hessian": lambda model, x: functional.hessian(
        lambda scale: model(scale * x).square().sum(), torch.ones(3, 1, 1, dtype=x.dtype, device=DEVICE)
    ),
    "jacobian in a batch": lambda model, x: functional.jacobian(
        lambda t: model(t).flatten(1).square().sum(0)[:4], x, vectorize=True
    ),
}


@pytest.mark.parametrize(
    ("name", "way"), [*itertools.product(list(NETWORKS)[:3], NETWORK_WAYS), ("resnet", "grad"), ("resnet", "MAML")]
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_fused_networks_give_what_their_twins_give(name: str, training: bool, way: str) -> None:
    eager = lively(NETWORKS[name]()).double().train(training)
    fused = copy.deepcopy(eager)
    assert fuse_(fused).fused
    side = 40 if name == "resnet" else 8  # its last feature map needs more than one value in training
    x = torch.randn(2, 3, side, side, dtype=torch.float64, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    expected, found = (NETWORK_WAYS[way](model, x) for model in (eager, fused))
    # Some twenty layers of float64, against the size of the largest of each gradient's values.
    for i, (a, e) in enumerate(
        zip(*(f if isinstance(f, (list, tuple)) else [f] for f in (found, expected)), strict=True)
    ):
        assert (a - e).abs().max() <= 1e-7 * max(1, e.abs().max()), i
    for a, e in zip(fused.buffers(), eager.buffers(), strict=True):
        close(a, e)
