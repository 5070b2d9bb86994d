"""Every public op under torch.func's transforms and in forward mode, where the reference must run: against the native
kernels' own gradients outside of any transform; and explicit backends and packed weights, which must refuse."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import DEVICE
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import fused_cnn
from fused_cnn import _candidates, ops
from fused_cnn._backends import BackendUnavailable
from fused_cnn.ops import BatchNormArgs, FoldedConv

C, OUT, SIDE = 3, 4, 5


class Problem(NamedTuple):
    """An op as a function of its differentiable arguments, and their shapes; the first one is x."""

    call: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]


def batch_norm(weight: Tensor, bias: Tensor, training: bool) -> BatchNormArgs:
    """Without running statistics where they would be updated: PyTorch's own cannot be, under vmap."""
    if training:
        return BatchNormArgs(weight, bias, None, None, True)
    mean = torch.linspace(-1, 1, C, dtype=weight.dtype, device=DEVICE)
    return BatchNormArgs(weight, bias, mean, mean.abs() + 0.5, False)


X, VECTOR = (2, C, SIDE, SIDE), (C,)
INCEPTION = ((2, C, 1, 1), (2, C, 1, 1), (3, 2, 3, 3), (2, C, 1, 1), (2, 2, 5, 5), (1, C, 1, 1))
PROBLEMS = {
    "conv_bias_relu": Problem(
        lambda x, w, b, r, backend: ops.conv_bias_relu(x, w, b, r, padding=1, backend=backend),
        (X, (OUT, C, 3, 3), (OUT,), (2, OUT, SIDE, SIDE)),
    ),
    "conv_bias_relu in groups": Problem(
        lambda x, w, backend: ops.conv_bias_relu(x, w, stride=2, dilation=2, groups=C, relu=False, backend=backend),
        (X, (2 * C, 1, 2, 2)),
    ),
    "conv1x1_bias_relu": Problem(
        lambda x, w, b, backend: ops.conv1x1_bias_relu(x, w, b, stride=2, backend=backend), (X, (OUT, C, 1, 1), (OUT,))
    ),
    "add_relu": Problem(lambda x, r, backend: ops.add_relu(x, r, backend=backend), (X, X)),
    "concat_bias_relu": Problem(
        lambda x, y, b, backend: ops.concat_bias_relu([x, y], b, backend=backend), (X, (2, 2, SIDE, SIDE), (C + 2,))
    ),
    "max_pool2d": Problem(
        lambda x, backend: ops.max_pool2d(x, 3, 2, 1, ceil_mode=True, backend=backend), ((2, C, 6, 6),)
    ),
    "inception": Problem(
        lambda x, *p, backend: ops.inception(x, p[:6], p[6:], backend=backend),
        (X, *INCEPTION, *((shape[0],) for shape in INCEPTION)),
    ),
}
for _training in (False, True):
    _mode = "training" if _training else "eval"

    def _bn(weight: Tensor, bias: Tensor, training: bool = _training) -> BatchNormArgs:
        return batch_norm(weight, bias, training)

    PROBLEMS |= {
        f"bn_relu, {_mode}": Problem(
            lambda x, w, b, backend, bn=_bn: ops.bn_relu(x, bn(w, b), backend=backend), (X, VECTOR, VECTOR)
        ),
        f"bn_add_relu, {_mode}": Problem(
            lambda x, w, b, r, backend, bn=_bn: ops.bn_add_relu(x, bn(w, b), r, backend=backend), (X, VECTOR, VECTOR, X)
        ),
        f"bn_add_relu with two, {_mode}": Problem(
            lambda x, w, b, r, v, c, backend, bn=_bn: ops.bn_add_relu(x, bn(w, b), r, bn(v, c), backend=backend),
            (X, VECTOR, VECTOR, X, VECTOR, VECTOR),
        ),
        f"bn_relu_concat, {_mode}": Problem(
            lambda x, w, b, y, v, c, backend, bn=_bn: ops.bn_relu_concat([x, y], [bn(w, b), bn(v, c)], backend=backend),
            (X, VECTOR, VECTOR, X, VECTOR, VECTOR),
        ),
        f"bn_relu_conv, {_mode}": Problem(
            lambda x, w, b, weight, c, backend, bn=_bn: ops.bn_relu_conv(
                x, bn(w, b), weight, c, padding=1, backend=backend
            ),
            (X, VECTOR, VECTOR, (OUT, C, 3, 3), (OUT,)),
        ),
    }

each_problem = pytest.mark.parametrize("name", PROBLEMS)
EXPLICIT = ["native", "triton"] if DEVICE == "cpu" else ["triton"]


def seeded(
    shapes: tuple[tuple[int, ...], ...], count: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """Arguments of these shapes, activations in channels_last; `count` of them, stacked, for vmap."""
    generator = torch.Generator().manual_seed(seed)
    leaves = []
    for shape in shapes:
        t = torch.randn((count or 1, *shape), generator=generator, dtype=torch.float64)
        if len(shape) == 4:
            t = t.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (count or 1, shape[0]))
        leaves.append((t if count else t[0]).to(DEVICE, dtype))
    return leaves


def leaves_of(name: str, count: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    return seeded(PROBLEMS[name].shapes, count, dtype, seed)


def auto(name: str) -> Callable[..., Tensor]:
    return lambda *leaves: PROBLEMS[name].call(*leaves, backend=None)


def kernels_gradients(name: str, leaves: list[Tensor], seed: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """What backend=None gives outside of a transform: on a CPU native kernels and their backward."""
    given = [t.detach().clone().requires_grad_() for t in leaves]
    out = auto(name)(*given)
    if DEVICE == "cpu":
        assert out.grad_fn is not None and out.grad_fn.name().startswith("_")  # a Function of this package
    return torch.autograd.grad(out, given, seed(out))


def direction(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out)


@each_problem
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_forward_mode_is_the_transpose_of_the_kernels_backward(name: str, dtype: torch.dtype) -> None:
    leaves, tangents = leaves_of(name, dtype=dtype), leaves_of(name, dtype=dtype, seed=1)
    out, tangent = jvp(auto(name), tuple(leaves), tuple(tangents))
    v = direction(out)
    grads = kernels_gradients(name, leaves, direction)
    # Sums of some hundred products, twice in a row.
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(out, auto(name)(*leaves), **close)
    expected = [(g * t).sum() for g, t in zip(grads, tangents, strict=True)]
    torch.testing.assert_close((v * tangent).sum(), torch.stack(expected).sum(), **close)
    for i, (leaf, t) in enumerate(zip(leaves, tangents, strict=True)):
        with forward_ad.dual_level():
            dual = PROBLEMS[name].call(*leaves[:i], forward_ad.make_dual(leaf, t), *leaves[i + 1 :], backend=None)
            found = forward_ad.unpack_dual(dual).tangent
        torch.testing.assert_close((v * found).sum(), expected[i], **close, msg=lambda m, i=i: f"argument {i}: {m}")


@each_problem
def test_reverse_mode_gives_the_kernels_gradients(name: str) -> None:
    leaves, every = leaves_of(name), tuple(range(len(PROBLEMS[name].shapes)))
    expected = kernels_gradients(name, leaves, lambda out: 2 * out)
    torch.testing.assert_close(grad(lambda *t: auto(name)(*t).square().sum(), every)(*leaves), expected)
    out, pull = vjp(auto(name), *leaves)
    torch.testing.assert_close(pull(2 * out), expected)


@each_problem
def test_jacobians_and_hessians(name: str) -> None:
    """jacrev and jacfwd are vmap over vjp and jvp, hessian is one over the other. Of a second derivative the reference
    alone knows the truth."""
    leaves, every = leaves_of(name), tuple(range(len(PROBLEMS[name].shapes)))

    def sums(*t: Tensor) -> Tensor:
        return auto(name)(*t).square().sum((0, 2, 3))

    rows = []
    for channel in range(sums(*leaves).numel()):

        def seed(out: Tensor, channel: int = channel) -> Tensor:
            only = torch.zeros_like(out)
            only[:, channel] = 2 * out[:, channel].detach()
            return only

        rows.append(kernels_gradients(name, leaves, seed))
    expected = tuple(map(torch.stack, zip(*rows, strict=True)))
    torch.testing.assert_close(jacrev(sums, every)(*leaves), expected)
    torch.testing.assert_close(jacfwd(sums, every)(*leaves), expected)

    last = leaves[-1]
    found = hessian(lambda t: sums(*leaves[:-1], t).sum())(last)
    truth = torch.autograd.functional.hessian(
        lambda t: PROBLEMS[name].call(*leaves[:-1], t, backend="reference").square().sum(), last
    )
    assert truth.abs().max() > 0
    torch.testing.assert_close(found, truth)


@each_problem
def test_vmap_gives_what_calls_one_by_one_give(name: str) -> None:
    leaves = leaves_of(name, 3)
    one_by_one = [auto(name)(*t) for t in zip(*leaves, strict=True)]
    torch.testing.assert_close(vmap(auto(name))(*leaves), torch.stack(one_by_one))
    for i in range(len(leaves)):  # over one argument, such as a weight, alone
        mixed = [t if j == i else t[0] for j, t in enumerate(leaves)]
        dims = tuple(0 if j == i else None for j in range(len(leaves)))
        one_by_one = [auto(name)(*mixed[:i], t, *mixed[i + 1 :]) for t in leaves[i]]
        torch.testing.assert_close(vmap(auto(name), dims)(*mixed), torch.stack(one_by_one))


@each_problem
def test_gradients_of_every_sample(name: str) -> None:
    leaves, every = leaves_of(name, 3), tuple(range(len(PROBLEMS[name].shapes)))
    found = vmap(grad(lambda *t: auto(name)(*t).square().sum(), every))(*leaves)
    rows = [kernels_gradients(name, list(t), lambda out: 2 * out) for t in zip(*leaves, strict=True)]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*rows, strict=True))))


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_running_statistics_are_updated_under_a_transform(transform: str) -> None:
    x, weight, bias = leaves_of("bn_relu, training")
    buffers = []
    for under in (False, True):
        mean, var = torch.zeros_like(weight), torch.ones_like(weight)

        def run(x: Tensor, mean: Tensor = mean, var: Tensor = var) -> Tensor:
            return ops.bn_relu(x, BatchNormArgs(weight, bias, mean, var, True)).sum()

        if not under:
            run(x)
        elif transform == "grad":
            grad(run)(x)
        else:
            jvp(run, (x,), (x,))
        buffers.append((mean, var))
    torch.testing.assert_close(*buffers)


def test_an_ensemble_of_modules() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(C, OUT, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = ops.conv_bias_relu(x, self.conv.weight, self.conv.bias, padding=1)
            return ops.max_pool2d(y, 2)

    blocks = [Block().to(DEVICE) for _ in range(3)]
    parameters, buffers = stack_module_state(blocks)
    x = torch.randn(2, C, SIDE, SIDE, device=DEVICE)
    found = vmap(lambda p, b: functional_call(blocks[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([block(x) for block in blocks]))


@each_problem
@pytest.mark.parametrize("backend", EXPLICIT)
def test_an_explicit_backend_refuses_and_says_what_to_do(name: str, backend: str) -> None:
    leaves = leaves_of(name, dtype=torch.float32)

    def explicit(*t: Tensor) -> Tensor:
        return PROBLEMS[name].call(*t, backend=backend)

    refuses = pytest.raises(BackendUnavailable, match=f"{backend}.* use backend=None or 'reference'")
    with refuses:
        jvp(explicit, tuple(leaves), tuple(leaves))
    with refuses:
        grad(lambda *t: explicit(*t).sum())(*leaves)
    with refuses:
        vmap(explicit)(*(t[None] for t in leaves))
    with refuses, forward_ad.dual_level():
        explicit(forward_ad.make_dual(leaves[0], leaves[0]), *leaves[1:])


@pytest.mark.skipif(DEVICE != "cpu", reason="weights are packed for the native CPU kernels")
def test_packed_weights_refuse_and_are_not_made() -> None:
    x, weight = torch.randn(2, C, SIDE, SIDE), torch.randn(C, C, 3, 3)
    shapes = [(3, C, 1), (4, C, 1), (5, 4, 3), (2, C, 1), (3, 2, 3), (4, C, 1)]
    weights = [torch.randn(o, i, k, k) for o, i, k in shapes]
    biases = [torch.randn(o) for o, _, _ in shapes]
    conv = [FoldedConv(weight, None, padding=1)]
    packed, left = ops.pack_conv(weight, None, like=x)
    block, none = ops.pack_inception(weights, biases, like=x)
    stage = ops.pack_residual_block(conv, None, shortcut=True, like=x)
    assert isinstance(packed, ops.PackedConv) and isinstance(block, ops.PackedInception) and stage is not None
    calls = {
        "conv_bias_relu": lambda x: ops.conv_bias_relu(x, packed, left, padding=1),
        "inception": lambda x: ops.inception(x, block, none),
        "residual_stage": lambda x: ops.residual_stage(x, stage),
    }
    for name, call in calls.items():
        call(x)
        with pytest.raises(BackendUnavailable, match=f"{name}.*backend=None.* plain weights"):
            jvp(call, (x,), (x,))
        with pytest.raises(BackendUnavailable, match=f"{name}.*backend=None.* plain weights"):
            vmap(call)(x[None])

    def plain(x: Tensor) -> Tensor:
        assert ops.pack_residual_block(conv, None, shortcut=True, like=x) is None
        y = ops.inception(x, *ops.pack_inception(weights, biases, like=x))
        return y, ops.conv_bias_relu(x, *ops.pack_conv(weight, None, like=x), padding=1)

    found = vmap(plain)(x[None])
    for actual, call in zip(found, (calls["inception"], calls["conv_bias_relu"]), strict=True):
        torch.testing.assert_close(actual[0], call(x), rtol=1e-4, atol=1e-4)


def test_no_table_is_asked_under_a_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, C, SIDE, SIDE, device=DEVICE)
    heard: list[str] = []
    monkeypatch.setattr(_candidates.measuring, "record", lambda op, *rest: heard.append(op.__name__))
    fused_cnn.add_relu(x, x)
    assert heard == ["add_relu"]
    jvp(lambda t: fused_cnn.add_relu(t, t), (x,), (x,))
    assert heard == ["add_relu"]


TRANSFORMED = {
    "vmap": lambda f: lambda x, w: vmap(f, (None, 0))(x, torch.stack([w, 2 * w])),
    "jvp": lambda f: lambda x, w: jvp(f, (x, w), (w.sum() * x, w)),
    "grad": lambda f: lambda x, w: grad(lambda t: f(x, t).square().sum())(w),
    "dual": lambda f: lambda x, w: dual_tangent(f, x, w),
    "none": lambda f: f,
}


def dual_tangent(f: Callable[..., Tensor], x: Tensor, w: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, 2 * x), w)).tangent


@pytest.mark.parametrize("transform", TRANSFORMED)
def test_a_compiled_function_that_transforms_an_op(transform: str) -> None:
    x, w = torch.randn(2, C, SIDE, SIDE, device=DEVICE), torch.randn(OUT, C, 3, 3, device=DEVICE)

    def op(x: Tensor, w: Tensor) -> Tensor:
        return ops.conv_bias_relu(x, w, padding=1)

    eager = TRANSFORMED[transform](op)
    torch._dynamo.reset()
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x, w), eager(x, w))


def test_what_was_compiled_outside_of_forward_mode_is_not_used_inside() -> None:
    x, w = torch.randn(2, C, SIDE, SIDE, device=DEVICE), torch.randn(OUT, C, 3, 3, device=DEVICE)

    def op(x: Tensor, w: Tensor) -> Tensor:
        return ops.conv_bias_relu(x, w, padding=1)

    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    compiled(x, w)
    torch.testing.assert_close(dual_tangent(compiled, x, w), dual_tangent(op, x, w))
