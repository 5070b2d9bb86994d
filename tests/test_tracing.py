"""Fused models under what records them or computes shapes alone: right where PyTorch's own modules are, or one clear
error before any work is done."""

import copy
import importlib
import io

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import DEVICE
from test_fuse import lively, logits, tv
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.models import resnet

from fused_cnn import fuse_, unfuse_

NETWORKS = {
    "resnet18": lambda: tv("resnet18"),
    "googlenet": lambda: tv("googlenet", aux_logits=False),
    "timm resnet18": lambda: timm.create_model("resnet18"),
    "resnext": lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def twins(name: str, side: int = 64) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    eager = lively(NETWORKS[name]()).eval()
    fused = copy.deepcopy(eager)
    fuse_(fused)
    return eager, fused, torch.randn(2, 3, side, side, device=DEVICE).contiguous(memory_format=torch.channels_last)


def close(actual: object, expected: object) -> None:
    # Float32 sums over thousands of products in another order, through some twenty layers.
    torch.testing.assert_close(logits(actual), logits(expected), rtol=1e-3, atol=1e-3)


def nodes(graph: torch.fx.GraphModule, name: str) -> int:
    """How many nodes of a graph call one of our ops whose name begins so."""
    return sum(str(node.target).startswith(f"fused_cnn.{name}") for node in graph.graph.nodes)


@pytest.mark.parametrize("strict", [False, True])
@each_network
@torch.no_grad()
def test_export_holds_blocks_and_no_packing(name: str, strict: bool) -> None:
    eager, fused, x = twins(name)
    program = torch.export.export(fused, (x,), strict=strict)
    if DEVICE == "cpu":
        assert nodes(program.graph_module, "folded_") > 0
    assert not any("pack" in str(node.target) for node in program.graph_module.graph.nodes)
    close(program.module()(x), eager(x))
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    close(torch.export.load(saved).module()(x), eager(x))


@each_network
@torch.no_grad()
def test_an_exported_model_sees_weights_that_are_loaded_into_it(name: str) -> None:
    eager, fused, x = twins(name)
    program = torch.export.export(fused, (x,)).module()
    program(x)
    for model in (eager, program):
        for parameter in model.parameters():
            parameter.mul_(0.9)
    close(program(x), eager(x))


@torch.no_grad()
def test_exports_with_a_dynamic_batch() -> None:
    eager, fused, x = twins("resnet18")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fused, (x,), dynamic_shapes={"x": {0: batch}}).module()
    for n in (1, 2, 5):
        images = torch.randn(n, 3, 64, 64, device=DEVICE).contiguous(memory_format=torch.channels_last)
        close(program(images), eager(images))


@each_network
def test_a_compiled_model_sees_every_change_that_eager_sees(name: str) -> None:
    torch._dynamo.reset()
    eager, fused, x = twins(name)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(x), eager(x))
        for model in (eager, fused):
            model.conv1.weight.mul_(1.5) if hasattr(model.conv1, "weight") else model.conv1.conv.weight.mul_(1.5)
        close(compiled(x), eager(x))
        for model in (eager, fused):
            model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})
        close(compiled(x), eager(x))
    for model in (eager, fused):
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, fused=True)
        (eager if model is eager else compiled)(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        close(compiled(x), eager(x))


def test_a_compiled_model_sees_what_becomes_of_a_block() -> None:
    torch._dynamo.reset()
    eager, fused, x = twins("resnet18")
    compiled = torch.compile(fused, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        for change in (
            lambda m: setattr(m.layer1[0], "relu", nn.Identity()),
            lambda m: setattr(m.layer2[0].bn1, "eps", 0.1),
            lambda m: setattr(m.layer3[0].conv2, "padding_mode", "circular"),
            lambda m: setattr(m.layer4[0].downsample, "1", nn.Identity()),
            lambda m: setattr(m, "relu", nn.SiLU()),
            lambda m: setattr(m, "fc", nn.Identity()),
        ):
            for model in (eager, fused):
                change(model)
            close(compiled(x), eager(x))


@torch.no_grad()
def test_a_compiled_model_runs_as_fast_as_its_graph_says() -> None:
    """One op a stage, and none that folds or packs."""
    torch._dynamo.reset()
    _, fused, x = twins("resnet18")
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(fused, fullgraph=True, backend=record)(x)
    assert len(graphs) == 1
    if DEVICE == "cpu":
        assert nodes(graphs[0], "folded_conv") == 1 and nodes(graphs[0], "folded_stage") == 4
        assert nodes(graphs[0], "max_pool2d") == 1


@each_network
@torch.no_grad()
def test_make_fx_records_blocks(name: str) -> None:
    eager, fused, x = twins(name)
    for how in ("real", "fake", "symbolic"):
        graph = make_fx(fused, tracing_mode=how, _allow_non_fake_inputs=True)(x)
        close(graph(x), eager(x))


@each_network
def test_fake_tensors_give_shapes_and_leave_nothing_behind(name: str) -> None:
    _, fused, x = twins(name)
    with torch.no_grad():
        expected = fused(x)
    with FakeTensorMode():
        model = tv("googlenet", aux_logits=False, init_weights=False) if name == "googlenet" else NETWORKS[name]()
        fuse_(model)
        images = torch.empty(2, 3, 64, 64)
        assert logits(model.train()(images)).shape == logits(model.eval()(images)).shape == logits(expected).shape
        with torch.no_grad():
            assert logits(model(images)).shape == logits(expected).shape
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        assert logits(fused(mode.from_tensor(x))).shape == logits(expected).shape
    with torch.no_grad():
        assert torch.equal(logits(fused(x)), logits(expected))


@each_network
@torch.no_grad()
def test_meta_models_give_shapes(name: str) -> None:
    eager, fused, x = twins(name)
    fused(x)
    fused.to("meta")
    assert fused(x.to("meta")).shape == eager(x).shape


@each_network
@torch.no_grad()
def test_symbolic_trace_keeps_blocks_as_leaves(name: str) -> None:
    eager, fused, x = twins(name)
    graph = torch.fx.symbolic_trace(fused)
    close(graph(x), eager(x))
    leaf = {"googlenet": "inception3a"}.get(name, "layer1.0")
    assert any(node.op == "call_module" and node.target == leaf for node in graph.graph.nodes)
    for model in (eager, fused):
        for parameter in model.parameters():
            parameter.mul_(0.9)
    close(graph(x), eager(x))


@torch.no_grad()
def test_feature_extractors_run_blocks() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    for name, wanted in (("resnet18", ["layer1", "layer2.0", "layer4", "fc"]), ("googlenet", ["inception3a", "fc"])):
        eager, fused, x = twins(name)
        made = [create_feature_extractor(model, wanted)(x) for model in (eager, fused)]
        for key in wanted:
            close(made[1][key], made[0][key])
    getter = torchvision.models._utils.IntermediateLayerGetter(twins("resnet18")[1], {"layer2": "out"})
    close(
        getter(x)["out"],
        torchvision.models._utils.IntermediateLayerGetter(twins("resnet18")[0], {"layer2": "out"})(x)["out"],
    )


@each_network
@torch.no_grad()
def test_jit_trace_records_pytorchs_operators(name: str) -> None:
    eager, fused, x = twins(name)
    fused(x)
    traced = torch.jit.trace(fused, x, check_trace=False)
    for _ in range(3):
        close(traced(x), eager(x))
    assert "fused_cnn" not in str(traced.inlined_graph)
    close(fused(x), eager(x))


@each_network
def test_jit_script_says_what_to_do(name: str) -> None:
    _, fused, x = twins(name)
    with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile .*unfuse_\(model\) first"):
        torch.jit.script(fused)
    assert fuse_(fused).fused == []  # still fused
    if "googlenet" not in name:
        close(torch.jit.script(unfuse_(fused))(x), fused(x))


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_export_writes_onnxs_operators(dynamo: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    eager, fused, x = twins("resnet18")
    with torch.no_grad():
        fused(x)
        file = io.BytesIO()
        if dynamo:
            program = torch.onnx.export(fused, (x,), dynamo=True, verbose=False)
            program.save(file)
        else:
            torch.onnx.export(fused, (x,), file, dynamo=False)
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        (out,) = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})
        close(torch.from_numpy(out), eager(x).cpu())


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
@torch.no_grad()
def test_flops_of_a_recorded_graph_are_eagers(name: str) -> None:
    eager, fused, x = twins(name)
    program = torch.export.export(fused, (x,)).module()
    counted = []
    for model in (eager, fused, program):
        with FlopCounterMode(display=False) as counter:
            model(x)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] == counted[2] > 0


class _Tagged(Tensor):
    """A subclass that a user might hand in."""


@torch.no_grad()
def test_tensor_subclasses_and_other_ranks_go_through() -> None:
    eager, fused, x = twins("resnet18")
    for images in (tv_tensors.Image(x), x.as_subclass(_Tagged), nn.Parameter(x)):
        close(fused(images), eager(images))
        assert type(fused(images)) is type(eager(images))
    block = importlib.import_module("torchvision.models.googlenet").BasicConv2d(3, 4, kernel_size=1)
    pool = nn.Sequential(nn.MaxPool2d(2))
    fuse_(pool)
    assert torch.equal(pool(x[0]), F.max_pool2d(x[0], 2))
    fuse_(block)
    with pytest.raises(ValueError, match="expected 4D input"):  # BatchNorm's own
        block.eval()(x[0])
