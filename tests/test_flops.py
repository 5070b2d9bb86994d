"""torch.utils.flop_counter counts fused ops and networks as it counts the convolutions that they stand for."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, backends
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import googlenet, resnet18, resnet50, resnext50_32x4d

import fused_cnn
from fused_cnn import ops
from fused_cnn.ops import FoldedConv

NETWORKS = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "resnext50": resnext50_32x4d,
    "googlenet": lambda: googlenet(weights=None, init_weights=False, aux_logits=False),
}


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fused_network_counts_as_eager_does(name: str) -> None:
    eager = NETWORKS[name]().to(DEVICE)
    fused = copy.deepcopy(eager)
    fused_cnn.fuse_(fused, strict=True)
    x = torch.randn(2, 3, 40, 40, device=DEVICE)
    for model in (eager, fused):
        model.eval()
    with torch.no_grad():
        expected = counted(lambda: eager(x))
        assert expected > 1e7
        fused(x)  # folds
        assert counted(lambda: fused(x)) == expected
    for training in (False, True):
        eager.train(training), fused.train(training)
        both = [counted(lambda m=m: m(x).sum().backward()) for m in (eager, fused)]
        assert both[0] == both[1] > 2 * expected


@pytest.mark.parametrize("backend", [None, *backends()])
@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False), (False, False)])
def test_a_convolution_counts_as_eager_does(needs: tuple[bool, bool], backend: str | None) -> None:
    for how in ({"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2}):
        x = torch.randn(2, 4, 7, 6, device=DEVICE, requires_grad=needs[0])
        weight = torch.randn(6, 4 // how.get("groups", 1), 3, 2, device=DEVICE, requires_grad=needs[1])

        def run(conv: Callable[..., Tensor], **options: Any) -> None:
            out = conv(x, weight, **options)  # noqa: B023
            if out.requires_grad:
                out.sum().backward()

        expected = counted(lambda how=how: run(F.conv2d, **how))
        assert counted(lambda how=how: run(ops.conv_bias_relu, backend=backend, **how)) == expected > 0


@pytest.mark.parametrize("backend", [None, *backends()])
def test_inception_counts_as_eager_does(backend: str | None) -> None:
    x = torch.randn(2, 8, 5, 4, device=DEVICE)
    widths = [(3, 8, 1), (4, 8, 1), (5, 4, 3), (2, 8, 1), (3, 2, 5), (4, 8, 1)]
    weights = [torch.randn(o, i, k, k, device=DEVICE) for o, i, k in widths]
    biases = [w.new_zeros(w.size(0)) for w in weights]
    expected = counted(lambda: ops.inception(x, weights, biases, backend="reference"))
    assert counted(lambda: ops.inception(x, weights, biases, backend=backend)) == expected > 0
    if backend is None:
        packed = ops.pack_inception(weights, biases, like=x)
        assert counted(lambda: ops.inception(x, *packed)) == expected


@pytest.mark.skipif(DEVICE != "cpu", reason="stages are packed for the native CPU kernels")
def test_a_stage_with_a_projection_counts_as_its_convolutions_do() -> None:
    x = torch.randn(2, 4, 9, 7)
    convs = [FoldedConv(torch.randn(6, 4, 1, 1), None), FoldedConv(torch.randn(8, 6, 3, 3), None, 2, 1)]
    projection = FoldedConv(torch.randn(8, 4, 1, 1), None, 2)
    again = [FoldedConv(torch.randn(8, 8, 3, 3), None, 1, 1)]
    stage = ops.pack_residual_block(convs, projection, shortcut=True, like=x)
    block = ops.pack_residual_block(again, None, shortcut=True, like=x)
    assert stage is not None and block is not None
    stage = stage.then(block)

    def eager() -> None:
        y = x
        for c in (*convs, *again):
            y = F.conv2d(y, c.weight, None, c.stride, c.padding)
        F.conv2d(x, projection.weight, None, projection.stride)

    assert counted(lambda: ops.residual_stage(x, stage)) == counted(eager) > 0


@pytest.mark.parametrize("first", ["fused_cnn", "torch.utils.flop_counter"])
def test_the_order_of_imports_does_not_matter_and_ours_imports_no_counter(first: str) -> None:
    """The counter imports Triton, which takes longer than all of fused_cnn."""
    code = f"""
import importlib, sys
importlib.import_module({first!r})
import fused_cnn, torch
early = "torch.utils.flop_counter" in sys.modules
assert early == ({first!r} != "fused_cnn") and (early or "triton" not in sys.modules)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fused_cnn.conv_bias_relu(torch.ones(1, 2, 3, 3), torch.ones(4, 2, 1, 1), backend="native")
assert counter.get_total_flops() == 2 * 9 * 4 * 2, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
