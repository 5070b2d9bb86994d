"""bn_relu, bn_add_relu, bn_relu_concat and bn_relu_conv: nn.BatchNorm2d's semantics in every mode, what is saved, and
what goes wrong."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, backends
from torch import Tensor, nn

from fused_cnn import bn_add_relu, bn_relu, bn_relu_concat, bn_relu_conv
from fused_cnn._library import kernel
from fused_cnn.ops.batch_norm.args import BatchNormArgs

of = BatchNormArgs.of


def batch_norm(channels: int, dtype: torch.dtype = torch.float32, **options: object) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(channels, **options).to(DEVICE, dtype)
    with torch.no_grad():
        if module.affine:
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_()
        if module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return module


def activation(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Tensor:
    x = (torch.randn(shape, device=DEVICE) + mean).to(dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


MODES = [
    dict(zip(("momentum", "track_running_stats", "affine"), values, strict=True))
    for values in itertools.product((0.1, None, 1.0), (True, False), (True, False))
]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_steps_and_eval_follow_batch_norm_2d(mode: dict, dtype: torch.dtype) -> None:
    theirs = batch_norm(24, eps=1e-3, **mode)
    ours = copy.deepcopy(theirs)
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for step in range(5):
        training = step not in (2, 4)
        x = activation(4, 24, 7, 5, dtype=dtype, mean=step)
        theirs.train(training)
        ours.train(training)
        expected, actual = F.relu(theirs(x)), bn_relu(x, of(ours))
        torch.testing.assert_close(actual, expected, **tolerance)
        for (name, a), b in zip(theirs.named_buffers(), ours.buffers(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        grads = [
            torch.autograd.grad(o.square().sum(), [x, *m.parameters()]) for o, m in ((expected, theirs), (actual, ours))
        ]
        for a, b in zip(*grads, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(b, a, rtol=tolerance["rtol"], atol=20 * tolerance["atol"])


def test_frozen_statistics_still_give_gradients_and_stay_as_they_are() -> None:
    module = batch_norm(16).eval()
    before = copy.deepcopy(module.state_dict())
    x, residual = activation(2, 16, 6, 6), activation(2, 16, 6, 6)
    leaves = [x, residual, *module.parameters()]
    expected = torch.autograd.grad(F.relu(module(x) + residual).square().sum(), leaves)
    actual = torch.autograd.grad(bn_add_relu(x, of(module), residual).square().sum(), leaves)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_statistics_may_move_between_forward_and_backward() -> None:
    module = batch_norm(8).eval()
    x = activation(2, 8, 4, 4)
    frozen = bn_relu(x, of(module))
    expected = torch.autograd.grad(frozen.sum(), x, retain_graph=True)[0]
    bn_relu(activation(2, 8, 4, 4), of(module.train()))
    assert torch.equal(torch.autograd.grad(frozen.sum(), x)[0], expected)


def test_variance_survives_a_large_mean() -> None:
    values = torch.randn(8, 16, 9, 9, dtype=torch.float64)
    values[:1] -= 1000  # the first image far from the others: a shift taken from it would not help
    x = (values + 3000).float().contiguous(memory_format=torch.channels_last)
    _, _, var = kernel("bn_stats", "native")([x.to(DEVICE)], [0.0])
    expected = x.double().var(dim=(0, 2, 3))
    torch.testing.assert_close(var.cpu().double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_nan_and_infinity_behave_as_eager(training: bool) -> None:
    x = activation(2, 5, 6, 6).detach()
    x[0, 1, 2, 3], x[1, 2, 0, 0], x[0, 3, 0, 0] = float("nan"), float("inf"), float("-inf")
    x.requires_grad_()
    residual = activation(2, 5, 6, 6)
    module = batch_norm(5).train(training)
    for ours, theirs in (
        (lambda m: bn_relu(x, of(m)), lambda m: F.relu(m(x))),
        (lambda m: bn_add_relu(x, of(m), residual), lambda m: F.relu(m(x) + residual)),
    ):
        a, b = ours(copy.deepcopy(module)), theirs(copy.deepcopy(module))
        torch.testing.assert_close(a, b, equal_nan=True)
        grads = [torch.autograd.grad(o, x, torch.ones_like(o))[0] for o in (a, b)]
        torch.testing.assert_close(*grads, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_a_branch_may_be_a_slice_and_the_gradient_too() -> None:
    wide, modules = activation(2, 40, 7, 7), [batch_norm(c) for c in (16, 24)]

    def run(op: object) -> list[Tensor]:
        copies = copy.deepcopy(modules)
        out = op(wide.split([16, 24], dim=1), copies)  # type: ignore[operator]
        joined = torch.cat([out, wide.square()], dim=1)  # whose gradient is sliced on its way back
        grads = torch.autograd.grad(joined.square().sum(), [wide, *(p for m in copies for p in m.parameters())])
        return [out, *grads]

    ours = run(lambda xs, ms: bn_relu_concat(xs, [of(m) for m in ms]))
    theirs = run(lambda xs, ms: torch.cat([F.relu(m(x)) for x, m in zip(xs, ms, strict=True)], dim=1))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def saved_bytes(run: object) -> int:
    """Bytes that backward keeps, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()  # type: ignore[operator]  # noqa: F841  (alive, so that its memory is not used again)
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fewer_bytes_are_saved_than_in_eager(dtype: torch.dtype) -> None:
    x, r = activation(2, 64, 28, 28, dtype=dtype), activation(2, 64, 28, 28, dtype=dtype)
    a, b = batch_norm(64), batch_norm(64)
    activation_bytes = x.numel() * x.element_size()
    pairs = [
        (lambda: bn_relu(x, of(a)), lambda: F.relu(a(x)), 1.05),
        (lambda: bn_add_relu(x, of(a), r), lambda: F.relu(a(x) + r), 1.15),
        (lambda: bn_add_relu(x, of(a), r, of(b)), lambda: F.relu(a(x) + b(r)), 2.05),
        (lambda: bn_relu_concat([x, r], [of(a), of(b)]), lambda: torch.cat([F.relu(a(x)), F.relu(b(r))], 1), 2.05),
    ]
    for ours, theirs, most in pairs:
        assert saved_bytes(ours) < saved_bytes(theirs)
        assert saved_bytes(ours) <= most * activation_bytes


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, module = activation(4, 96, 28, 28), batch_norm(96)

    def run() -> list[Tensor]:
        out = bn_relu(x, of(copy.deepcopy(module)))
        return [out, torch.autograd.grad(out.square().sum(), x)[0]]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(3)
        three = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_compiled_training_step_updates_the_buffers() -> None:
    class Block(nn.Module):
        def __init__(self, momentum: float | None) -> None:
            super().__init__()
            self.first, self.second = batch_norm(8, momentum=momentum), batch_norm(8, momentum=momentum)

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return bn_add_relu(bn_relu(x, of(self.first)), of(self.second), r)

    for momentum in (0.1, None):
        torch._dynamo.reset()
        eager = Block(momentum)
        module = copy.deepcopy(eager)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            x, r = activation(2, 8, 6, 6), activation(2, 8, 6, 6)
            results = []
            for block in (eager, compiled):
                out = block(x, r)
                results.append([out, *torch.autograd.grad(out.square().sum(), [x, r])])
            torch.testing.assert_close(*results)
        torch.testing.assert_close(module.state_dict(), eager.state_dict())


def vectors(*channels: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    total = sum(channels)
    return (
        torch.randn(total, device=DEVICE),
        torch.rand(total, device=DEVICE) + 0.5,
        [torch.randn(c, device=DEVICE) for c in channels],
        [torch.randn(c, device=DEVICE) for c in channels],
    )


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [((2, 5, 4, 4), True), ((2, 5, 4, 4), False), ((0, 5, 4, 4), True), ((2, 1, 3, 3), False)],
    ids=str,
)
def test_opcheck(shape: tuple[int, int, int, int], channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, y = (torch.randn(shape, device=DEVICE).contiguous(memory_format=layout) for _ in range(2))
    c = shape[1]
    one, two = vectors(c), vectors(c, c)
    if x.numel():
        torch.library.opcheck(kernel("bn_stats", "native"), ([x, y], [1e-5, 1e-3]))
    torch.library.opcheck(kernel("bn_relu_concat_fwd", "native"), ([x, y], *two, True))
    torch.library.opcheck(
        kernel("bn_relu_concat_bwd", "native"), (torch.cat([x, y], 1), [x, y], *two, [True, False], True)
    )
    _, mask = kernel("bn_add_relu_fwd", "native")(x, y, *one, True)
    for save_mask in (True, False):
        torch.library.opcheck(kernel("bn_add_relu_fwd", "native"), (x, y, *one, save_mask))
    torch.library.opcheck(kernel("bn_add_relu_fwd", "native"), (x, y, *two, True))
    torch.library.opcheck(kernel("bn_add_relu_bwd", "native"), (y, x, None, mask, *one, [True]))
    torch.library.opcheck(kernel("bn_add_relu_bwd", "native"), (y, x, y, None, *two, [True, False]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [None, *backends()])
def test_under_autocast_the_convolution_alone_is_in_its_dtype(
    backend: str | None, dtype: torch.dtype, training: bool
) -> None:
    """Whatever x's dtype is, and with float32 weights."""
    theirs, conv = batch_norm(16).train(training), nn.Conv2d(16, 8, 3, padding=1).to(DEVICE)
    ours, x = copy.deepcopy(theirs), activation(4, 16, 7, 5, dtype=dtype)
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = conv(F.relu(theirs(x)))
        actual = bn_relu_conv(x, of(ours), conv.weight, conv.bias, padding=1, backend=backend)
    assert actual.dtype == expected.dtype == torch.bfloat16
    results = [
        (out, *torch.autograd.grad(out.float().square().sum(), [x, *bn.parameters(), *conv.parameters()]))
        for out, bn in ((actual, ours), (expected, theirs))
    ]
    for mine, true in zip(*results, strict=True):
        assert mine.dtype == true.dtype
        assert (mine - true).norm() <= 0.02 * true.norm()  # a few roundings to 8 bits, at other places


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_wrong_arguments_are_named(backend: str) -> None:
    x, module = activation(2, 8, 4, 4), batch_norm(8)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        bn_relu(activation(1, 8, 1, 1), of(module), backend=backend)
    with pytest.raises(ValueError, match=r"bn_relu: weight must have shape \(6,\), got \(8,\)"):
        bn_relu(activation(2, 6, 4, 4), of(module), backend=backend)
    with pytest.raises(ValueError, match="branch 1 has"):
        bn_relu_concat([x, activation(2, 8, 4, 5)], [of(module)] * 2, backend=backend)
    with pytest.raises(ValueError, match="one BatchNormArgs for each of 1 branches, got 2"):
        bn_relu_concat([x], [of(module)] * 2, backend=backend)
    with pytest.raises(ValueError, match="residual must have x's shape"):
        bn_add_relu(x, of(module), activation(2, 8, 4, 1), backend=backend)
    with pytest.raises(TypeError, match="residual must have x's dtype"):
        bn_add_relu(x, of(module), activation(2, 8, 4, 4, dtype=torch.bfloat16), backend=backend)
    with pytest.raises(TypeError, match=r"weight must be torch.float64"):
        bn_relu(x.double(), of(module), backend=backend)
    with pytest.raises(ValueError, match="training=False needs running_mean"):
        bn_relu(x, BatchNormArgs(None, None, None, None, training=False), backend=backend)


def test_registered_ops_check_before_they_read() -> None:
    x = activation(2, 8, 4, 4).detach()
    mean, rstd, w, b = vectors(8)
    short = torch.ones(3, device=DEVICE)
    forward, backward = kernel("bn_relu_concat_fwd", "native"), kernel("bn_relu_concat_bwd", "native")
    add_backward = kernel("bn_add_relu_bwd", "native")
    bad = torch.zeros(1, 1, dtype=torch.uint8, device=DEVICE)
    calls = [
        lambda: forward([x], short, rstd, w, b, True),
        lambda: forward([x], mean, rstd, [short], b, True),
        lambda: forward([x], mean, rstd, w, [short], True),
        lambda: forward([x], mean.double(), rstd, w, b, True),
        lambda: forward([x, x], mean, rstd, w, b, True),
        lambda: forward([], mean, rstd, w, b, True),
        lambda: forward([x.int()], mean, rstd, w, b, True),
        lambda: backward(x[:, :4], [x], mean, rstd, w, b, [True], True),
        lambda: backward(x, [x], mean, rstd, w, b, [], True),
        lambda: add_backward(x, x, None, bad, mean, rstd, w, b, [True]),
        lambda: add_backward(x, x, None, None, mean, rstd, w, b, [True]),
        lambda: add_backward(x, x, None, None, *vectors(8, 8), [True, True]),
        lambda: kernel("bn_stats", "native")([x[:0]], [1e-5]),
        lambda: kernel("bn_stats", "native")([x], []),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="bn_"):
            call()


def test_a_batch_whose_variance_overflows_leaves_infinity_in_the_running_one() -> None:
    """Not NaN, in which every later result would end."""
    norms = [nn.BatchNorm2d(4).to(DEVICE) for _ in range(2)]
    for scale in (1e22, 1.0):
        x = torch.randn(2, 4, 3, 3, device=DEVICE) * scale
        F.relu(norms[0](x))
        bn_relu(x, of(norms[1]))
    assert norms[1].running_var is not None and norms[1].running_var.isinf().all()
    torch.testing.assert_close(norms[1].running_var, norms[0].running_var)
    torch.testing.assert_close(norms[1].running_mean, norms[0].running_mean)
