"""max_pool2d: where the gradient of a window goes."""

import pytest
import torch
from conftest import DEVICE, backends

import fused_cnn

INF = float("inf")


@pytest.mark.skipif(DEVICE != "cpu", reason="max_pool2d has a native kernel on the CPU only")
@pytest.mark.parametrize("kernel", [2, 3])
def test_max_pool_sends_the_gradient_of_a_window_of_minus_infinity_to_its_first_pixel(kernel: int) -> None:
    x = torch.full((1, 17, 6, 6), -INF, device=DEVICE).requires_grad_()
    grads = [
        torch.autograd.grad(
            fused_cnn.max_pool2d(x, kernel, backend=backend), x, torch.ones(1, 17, 6 // kernel, 6 // kernel)
        )
        for backend in ("native", "reference")
    ]
    assert torch.equal(grads[0][0], grads[1][0])


@pytest.mark.skipif("triton" not in backends(), reason="Triton is not installed")
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 1, 1, 4), (3, 1, 0)], ids=str)  # one has windows without a pixel
def test_the_places_in_the_windows_survive_hooks_that_lose_their_layout(window: tuple[int, ...]) -> None:
    x = torch.randn(2, 5, 6, 7, device=DEVICE).contiguous(memory_format=torch.channels_last)
    expected, leaf = x.clone().requires_grad_(), x.requires_grad_()
    y = torch.nn.functional.max_pool2d(expected, *window)
    grad = torch.randn_like(y)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        out = fused_cnn.max_pool2d(leaf, *window, backend="triton")
    (wanted,) = torch.autograd.grad(y, expected, grad)
    for create_graph in (True, False):
        (found,) = torch.autograd.grad(out, leaf, grad, create_graph=create_graph)
        inside = wanted.isfinite()
        torch.testing.assert_close(found[inside], wanted[inside])
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif("triton" not in backends(), reason="Triton is not installed")
def test_a_gradient_keeps_a_byte_a_window_and_not_x() -> None:
    x = torch.randn(2, 8, 8, 8, device=DEVICE, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        fused_cnn.max_pool2d(x, 2, backend="triton")
    assert [(t.dtype, t.shape) for t in kept] == [(torch.uint8, (2, 8, 4, 4))]
