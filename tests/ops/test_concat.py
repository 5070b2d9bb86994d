"""concat_bias_relu: slices, gradients, opcheck, and errors that name the branch."""

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

from fused_cnn import concat_bias_relu
from fused_cnn._library import kernel


def branches(*channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        torch.randn(2, c, 5, 7, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        for c in channels
    ]


@pytest.mark.usefixtures("nan_filled_memory")
def test_every_channel_is_written_and_in_its_place() -> None:
    xs = branches(1, 3, 16, 17, 64)
    bias = torch.randn(101, device=DEVICE)
    out = concat_bias_relu(xs, bias)
    first = 0
    for x in xs:
        last = first + x.size(1)
        assert torch.equal(out[:, first:last], torch.relu(x + bias[first:last].view(1, -1, 1, 1)))
        first = last


def test_nan_passes_and_its_gradient_too() -> None:
    (x,) = branches(9)
    with torch.no_grad():
        x[0, 0], x[0, 1], x[0, 2] = float("nan"), 0.0, float("-inf")
    out = concat_bias_relu([x])
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    expected = torch.relu(x)
    (expected_grad,) = torch.autograd.grad(expected, x, torch.ones_like(out))
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(grad, expected_grad)


def test_gradients_are_dense_and_of_each_branch_s_own_memory() -> None:
    xs = branches(4, 12)
    out = concat_bias_relu(xs)
    grads = torch.autograd.grad(out.sum(), xs)
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in grads)
    assert len({g.untyped_storage().data_ptr() for g in grads}) == 2


def test_mixed_precision_bias_keeps_its_dtype() -> None:
    xs = branches(3, 5, dtype=torch.bfloat16)
    bias = torch.randn(8, device=DEVICE, requires_grad=True)
    out = concat_bias_relu(xs, bias)
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), bias)[0].dtype == torch.float32


@pytest.mark.parametrize("channels_last", [True, False])
def test_opcheck(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    xs = [x.detach().contiguous(memory_format=layout) for x in branches(3, 1, 4)]
    bias = torch.randn(8, device=DEVICE)
    forward, backward = kernel("concat_bias_relu_fwd", "native"), kernel("concat_bias_relu_bwd", "native")
    for b, relu in ((bias, True), (None, True), (bias, False)):
        torch.library.opcheck(forward, (xs, b, relu))
    out = forward(xs, bias, True)
    torch.library.opcheck(backward, (out, out, [3, 1, 4], True))
    torch.library.opcheck(backward, (out, None, [3, 1, 4], False))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_wrong_arguments_are_named(backend: str) -> None:
    xs = branches(3, 5)
    with pytest.raises(ValueError, match=r"branch 1 .*\(2, 3, 5, 7\), branch 1 has \(2, 4, 6, 7\)"):
        concat_bias_relu([xs[0], torch.randn(2, 4, 6, 7, device=DEVICE)], backend=backend)
    with pytest.raises(TypeError, match="branch 1 must have branch 0's dtype"):
        concat_bias_relu([xs[0], xs[1].double()], backend=backend)
    with pytest.raises(ValueError, match="at least one branch"):
        concat_bias_relu([], backend=backend)
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\), got \(3,\)"):
        concat_bias_relu(xs, torch.randn(3, device=DEVICE), backend=backend)


def test_registered_ops_check_before_they_read() -> None:
    xs = [x.detach() for x in branches(3, 5)]
    forward, backward = kernel("concat_bias_relu_fwd", "native"), kernel("concat_bias_relu_bwd", "native")
    out = forward(xs, None, True)
    calls = [
        lambda: forward(xs, torch.ones(3, device=DEVICE), True),
        lambda: forward(xs, torch.ones(8, device=DEVICE).double(), True),
        lambda: forward([xs[0], xs[1][:1]], None, True),
        lambda: forward([], None, True),
        lambda: backward(out, out, [3, 6], True),
        lambda: backward(out, out, [-1, 9], True),
        lambda: backward(out, out[:, :4], [3, 5], True),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="concat_bias_relu"):
            call()
