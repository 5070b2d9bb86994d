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
from functorch.compile import aot_module
from test_fuse import lively, logits, tv
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.models import resnet

from fused_cnn import _tables, fuse_, ops, unfuse_

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


def record(model: nn.Module, x: Tensor, how: str) -> nn.Module:
    """A graph of the model that others may run and differentiate."""
    if how.startswith("make_fx"):
        mode = how.partition(" ")[2] or "real"
        options = {"pre_dispatch": True} if mode == "pre_dispatch" else {"tracing_mode": mode}
        return make_fx(model, **options, _allow_non_fake_inputs=True)(x)
    return torch.export.export(model, (x,), strict=how == "strict export").module()


def gradients(model: nn.Module, x: Tensor, named: nn.Module, *, twice: bool = False) -> dict[str, Tensor]:
    """Of a loss, or of a penalty on its gradient, with respect to the input and `named`'s parameters."""
    torch.manual_seed(0)  # dropout's
    x = x.detach().requires_grad_()
    leaves = {"input": x, **dict(named.named_parameters())}
    loss = logits(model(x)).square().mean()
    if twice:
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = grad.square().sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=twice)  # a bias has no second derivative
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(leaves.items(), found, strict=True)}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """By name, relative to the largest value: they are of the same operators of PyTorch's, whose float32 sums may be
    added in another order."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        scale = wanted.abs().max().clamp_min(1e-30)
        torch.testing.assert_close(
            actual[name] / scale,
            wanted / scale,
            rtol=0.0,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("how", ["export", "strict export", "make_fx"])
@each_network
def test_a_recorded_training_step_is_eagers(name: str, how: str) -> None:
    """Gradients, and the running statistics behind it."""
    eager, fused, x = twins(name)
    eager.train(), fused.train()
    before = copy.deepcopy(fused.state_dict())
    graph = record(fused, x, how)
    named = fused if how == "make_fx" else graph
    named.load_state_dict(before)  # make_fx runs what it records
    same(gradients(graph, x, named), gradients(eager, x, eager))
    same(dict(named.named_buffers()), dict(eager.named_buffers()))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("how", ["export", "strict export", "make_fx"])
@each_network
def test_a_model_recorded_in_eval_can_be_differentiated(name: str, how: str, grad: bool) -> None:
    eager, fused, x = twins(name)
    with torch.set_grad_enabled(grad):
        graph = record(fused, x, how)
    named = fused if how == "make_fx" else graph
    same(gradients(graph, x, named), gradients(eager, x, eager))
    with torch.no_grad():
        close(graph(x), eager(x))


@pytest.mark.parametrize("how", ["make_fx pre_dispatch", "make_fx fake", "make_fx symbolic"])
def test_make_fx_keeps_gradients_however_it_records(how: str) -> None:
    for train in (False, True):
        eager, fused, x = twins("resnext")
        eager.train(train), fused.train(train)
        with torch.set_grad_enabled(train):
            graph = record(fused, x, how)
        same(gradients(graph, x, fused), gradients(eager, x, eager))


def test_an_exported_model_is_differentiable_twice() -> None:
    for name in ("resnext", "googlenet"):
        eager, fused, x = twins(name)
        with torch.no_grad():
            graph = record(fused, x, "export")
        same(gradients(graph, x, graph, twice=True), gradients(eager, x, eager, twice=True), 1e-3)  # longer sums


@torch.no_grad()
def test_an_exported_model_goes_through_torch_func() -> None:
    eager, fused, x = twins("resnet18")
    graph, tangent = record(fused, x, "export"), torch.randn_like(x)
    pushed = [torch.func.jvp(model, (x,), (tangent,))[1] for model in (eager, graph)]
    same({"jvp": pushed[1]}, {"jvp": pushed[0]})

    def per_image(model: nn.Module) -> dict[str, Tensor]:
        weights = {name: p.detach() for name, p in model.named_parameters()}

        def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
            return torch.func.functional_call(model, weights, (image[None],)).square().mean()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)

    eager, fused, _ = twins("resnet18")
    graph = torch.export.export(fused, (x[:1],)).module()
    same(per_image(graph), per_image(eager))


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_an_exported_model_is_trained_further(name: str) -> None:
    """Saved, loaded and exported again: as eager is, in eval form, and what it folds is of today's weights."""
    eager, fused, x = twins(name)
    with torch.no_grad():
        saved = io.BytesIO()
        torch.export.save(torch.export.export(fused, (x,)), saved)
        saved.seek(0)
        program = torch.export.load(saved).module()
        program = torch.export.export(program, (x,)).module()
    before = {name: p.detach().clone() for name, p in eager.named_parameters()}
    for _ in range(2):
        for model in (eager, program):
            optimizer = torch.optim.SGD(model.parameters(), 1e-2, fused=True)
            logits(model(x)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        learned = [{k: p.detach() - before[k] for k, p in m.named_parameters()} for m in (program, eager)]
        same(*learned, 1e-2)  # a difference of numbers that are much larger
        with torch.no_grad():
            close(program(x), eager(x))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("how", ["export", "strict export"])
def test_a_recorded_graph_holds_folded_blocks_and_nothing_without_a_derivative(how: str, grad: bool) -> None:
    def ours(graph: nn.Module) -> dict[str, int]:
        assert nodes(graph, "") == nodes(graph, "folded_")
        return {kind: nodes(graph, f"folded_{kind}") for kind in ("conv", "stage", "inception")}

    with torch.set_grad_enabled(grad):
        if DEVICE == "cpu":
            assert ours(record(*twins("resnet18")[1:], how)) == {"conv": 1, "stage": 4, "inception": 0}
        assert ours(record(*twins("resnext")[1:], how)) == {"conv": 1 + 4 * 4, "stage": 0, "inception": 0}
        assert ours(record(*twins("googlenet")[1:], how)) == {"conv": 3, "stage": 0, "inception": 9}


def test_a_recording_in_half_precision_can_be_differentiated() -> None:
    eager, fused, x = twins("resnext")
    with torch.autocast(DEVICE, torch.bfloat16):  # which PyTorch's own exports want around their runs, too
        with torch.no_grad():
            graph = record(fused, x, "export")
        # A sum of bfloat16 that is rounded the other way is a 256th off, and layers add up.
        same(gradients(graph, x, graph), gradients(eager, x, eager), 5e-2)


OPS = {
    "add_relu": lambda x, backend: ops.add_relu(x, 2 * x, backend=backend),
    "conv_bias_relu": lambda x, backend: ops.conv_bias_relu(x, torch.ones(4, 8, 3, 3).to(x), backend=backend),
    "max_pool2d": lambda x, backend: ops.max_pool2d(x, 2, backend=backend),
    "bn_relu": lambda x, backend: ops.bn_relu(x, ops.BatchNormArgs(None, None, None, None, True), backend=backend),
    "concat_bias_relu": lambda x, backend: ops.concat_bias_relu([x, 2 * x], torch.ones(16).to(x), backend=backend),
}


@pytest.mark.parametrize("backend", [None, "native"])
@pytest.mark.parametrize("name", OPS)
def test_ops_in_a_recording_keep_their_derivative(name: str, backend: str | None) -> None:
    if DEVICE == "cuda" and name == "max_pool2d":
        backend = None  # native has none there

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return OPS[name](x, backend)

    x = torch.randn(2, 8, 6, 6, device=DEVICE)
    expected = gradients(lambda x: OPS[name](x, "reference"), x, nn.Identity())
    for how in ("export", "strict export", "make_fx", "make_fx pre_dispatch"):
        same(gradients(record(Model(), x, how), x, nn.Identity()), expected)


def test_a_trace_that_is_differentiated_as_it_is_made_holds_fused_ops() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    eager, fused, x = twins("resnext")
    eager.train(), fused.train()
    compiled = aot_module(fused, fw_compiler=keep)
    close(compiled(x), eager(x))
    assert nodes(graphs[0], "bn_relu_concat_fwd") > 0


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
def test_a_compiled_model_is_compiled_once() -> None:
    """Though its first call is the process's first, at which the device's tables are read."""
    torch._dynamo.reset()
    _tables.forget()
    eager, fused, x = twins("resnet18")
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    close(compiled(x), eager(x))
    with torch.compiler.set_stance("fail_on_recompile"):
        for images in (x, torch.cat([x, x.flip(0), x])):
            close(compiled(images), eager(images))


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


class CallsForward(nn.Module):
    """Calls a block past nn.Module's own call."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block.forward(x)


@pytest.mark.parametrize(
    ("name", "part"), [("resnet18", "layer1.1"), ("resnet18", "layer1"), ("googlenet", "maxpool3")]
)
@torch.no_grad()
def test_jit_trace_records_what_is_called_by_its_forward(name: str, part: str) -> None:
    _, fused, _ = twins(name)
    block, x = fused.get_submodule(part), torch.randn(2, 64, 8, 8, device=DEVICE)
    block(x)
    traced = torch.jit.trace(CallsForward(block), x, check_trace=False)
    assert "fused_cnn" not in str(traced.inlined_graph)
    for p in block.parameters():
        p.mul_(1.2)
    close(traced(x), block(x))


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
