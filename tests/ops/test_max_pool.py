"""max_pool2d: where the gradient of a window goes."""

import pytest
import torch
from conftest import DEVICE

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
