"""tuning.py: what is measured decides, and only where it holds; tables survive bad files and many processes. Times are
made up."""

import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DEVICE, backends
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fused_cnn
from fused_cnn import _candidates, _tables, tuning
from fused_cnn.cli import run
from fused_cnn.nn import ConvBNReLU
from fused_cnn.ops import add_relu, bn_relu_concat, conv1x1_bias_relu, inception, max_pool2d
from fused_cnn.ops.inception.op import weight_shapes

PLACE = torch.zeros(1, device=DEVICE).device
KEY = ("add_relu", "inference", (("float32", (1, 8, 4, 4), "contiguous"),) * 2, ())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FUSED_CNN_CACHE_DIR", str(tmp_path / "cache"))
    _tables.forget()
    yield tmp_path / "cache"
    _tables.forget()


@pytest.fixture
def reference_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tuning, "_seconds", lambda variants, device: {name: 1.0 + (name != "reference") for name in variants}
    )


def measured_in(folder: Path) -> list[str]:
    """The keys of what was measured; that kernels were compared before their first use is no measurement."""
    documents = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return [key for document in documents for kind in ("choices", "tiles") for key in document[kind]]


def ops_of(work: Any) -> set[str]:
    """The registered ops that a piece of work calls."""
    called = set()

    class Watch(TorchDispatchMode):
        sees_fused_ops = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.add(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        work()
    return called


def add(x: Tensor, **options: Any) -> Any:
    return lambda: add_relu(x, x, **options)


@pytest.mark.usefixtures("folder", "reference_wins")
def test_the_fastest_runs_for_that_shape_and_nowhere_else() -> None:
    x, other = torch.randn(1, 8, 4, 4, device=DEVICE), torch.randn(1, 8, 4, 5, device=DEVICE)
    own = ops_of(add(x)) - {"aten::add.Tensor", "aten::relu"}
    assert own  # a fused op
    table = tuning.tune(lambda t: add_relu(t, t), x)
    (entry,) = table.choices.values()
    assert entry["best"] == "reference" and len(entry["seconds"]) >= 2
    assert not ops_of(add(x)) & own
    assert ops_of(add(other)) >= own
    assert ops_of(add(x.to(torch.bfloat16))) >= own
    assert ops_of(add(x.contiguous(memory_format=torch.channels_last))) >= own
    # An explicit backend is not asked about.
    assert ops_of(add(x, backend="native" if DEVICE == "cpu" else "triton")) >= own
    assert ops_of(add(x.clone().requires_grad_())) >= own  # nor is training, which was not measured


@pytest.mark.usefixtures("folder", "reference_wins")
def test_training_is_measured_with_its_backward_pass_and_a_compiled_model_still_runs() -> None:
    x = torch.randn(2, 8, 4, 4, device=DEVICE, requires_grad=True)
    tuning.tune(lambda t: add_relu(t, 2 * t), x, train=True)
    out = add_relu(x, 2 * x)
    assert out.grad_fn is not None and "AddReLU" not in out.grad_fn.name()
    compiled = torch.compile(lambda t: add_relu(t, 2 * t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), out)


@pytest.mark.usefixtures("folder", "reference_wins")
def test_the_models_own_tensors_are_left_alone() -> None:
    module = ConvBNReLU(3, 8, kernel_size=3, padding=1).to(DEVICE).train()
    x = torch.randn(2, 3, 9, 9, device=DEVICE)
    before = {name: t.clone() for name, t in (*module.state_dict().items(), ("x", x))}
    measured = tuning.tune(module, x, train=True)
    assert {key[0] for key in measured.choices} == {"bn_relu"}
    after = {**module.state_dict(), "x": x}
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert all(p.grad is None for p in module.parameters())


@torch.no_grad()
def test_an_inception_blocks_call_is_timed_with_packed_weights() -> None:
    shapes = weight_shapes(8, (8, 8, 16, 8, 8, 8), (3, 5))
    weights, biases = (
        [torch.randn(s, device=DEVICE) for s in shapes],
        [torch.randn(s[0], device=DEVICE) for s in shapes],
    )
    x = torch.randn(2, 8, 5, 5, device=DEVICE).contiguous(memory_format=torch.channels_last)
    (call,) = tuning._calls_of(lambda x: inception(x, weights, biases), [x], train=False)
    work = tuning._packed_block(call, PLACE)
    assert not ops_of(work) & {"fused_cnn::inception_fwd", "aten::cat"}
    assert work().shape == (2, 40, 5, 5)


def test_nothing_is_measured_unless_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_seconds", lambda variants, device: pytest.fail("measured"))
    for backend in (None, *backends()):
        conv1x1_bias_relu(
            torch.randn(1, 16, 4, 4, device=DEVICE), torch.randn(16, 16, 1, 1, device=DEVICE), backend=backend
        )
    assert not measured_in(folder)


def test_what_tune_cannot_do_is_an_error(folder: Path) -> None:
    x = torch.randn(1, 8, 4, 4, device=DEVICE)
    with pytest.raises(ValueError, match="PyTorch's own path, 'reference', must be among the candidates, got native"):
        tuning.tune(lambda t: add_relu(t, t), x, backends=("native",))
    with pytest.raises(ValueError, match="calls no fused op"):
        tuning.tune(nn.ReLU(), x)
    with pytest.raises(ZeroDivisionError):
        tuning.tune(lambda t: add_relu(t, t) / (1 // 0), x)
    assert _candidates.measuring.record is None and _candidates.measuring.table is None and not measured_in(folder)


@pytest.mark.skipif("triton" not in backends(), reason="Triton is not installed")
@pytest.mark.parametrize("train", [False, True])
def test_tritons_tiles_are_measured_kept_and_used(folder: Path, monkeypatch: pytest.MonkeyPatch, train: bool) -> None:
    def last_wins(variants: dict[Any, Any], device: torch.device) -> dict[Any, float]:
        for work in variants.values():
            work()
        return {name: -float(i) for i, name in enumerate(variants)}

    monkeypatch.setattr(tuning, "_seconds", last_wins)
    x, weight = torch.randn(1, 16, 4, 4, device=DEVICE), torch.randn(32, 16, 1, 1, device=DEVICE, requires_grad=train)
    measured = tuning.tune(
        lambda t: conv1x1_bias_relu(t.requires_grad_(train), weight), x, train=train, backends=("reference", "triton")
    )
    assert {key[0] for key in measured.tiles} == {"conv_fwd_kernel"}
    from fused_cnn.ops._triton_conv import TILES, Tiles, products

    key = next(k for k in measured.tiles if k[0] == "conv_fwd_kernel")
    tiles = TILES[products(torch.float32)]
    assert measured.tiles[key]["best"] == list(tiles[-1].choice)
    launched: list[Tiles] = []

    def picked(key: tuple[Any, ...], candidates: Any = tiles) -> Any:
        return _candidates.pick("conv_fwd_kernel", key, candidates, launched.append, PLACE, (1 << 20, 1 << 10, 1))

    assert picked(key[1:]) == tiles[-1].choice
    assert picked(key[1:], tiles[:1]) == tiles[0].choice  # no longer a candidate
    assert picked((*key[1:], "other")) == tiles[0].choice
    assert not launched  # the launcher launches, once


BAD = {
    "truncated": '{"version": 2, "choi',
    "empty": "",
    "a list": "[]",
    "another version": '{"version": 0}',
    "another device": '{"version": 2, "device": "NVIDIA Elsewhere"}',
}


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in BAD.items()])
def test_a_bad_or_foreign_file_is_a_warning_and_is_measured_anew(folder: Path, text: str, reference_wins: None) -> None:
    path = _tables.cache_file(PLACE)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    x = torch.randn(1, 8, 4, 4, device=DEVICE)
    with pytest.warns(UserWarning, match=r"fused_cnn ignores the tuning table .*; `fused-cnn tune` makes it anew"):
        add_relu(x, x)
    with pytest.warns(UserWarning, match="ignores"):
        tuning.tune(lambda t: add_relu(t, t), x)
    assert _tables.load(path, _tables.facts(PLACE)).choices.keys() == {KEY}


@pytest.mark.parametrize(
    ("kind", "key", "entry"),
    [
        *(("choices", KEY, entry) for entry in ({"best": "tensorrt"}, {}, "native")),
        *(("tiles", key, {"best": [64, 64]}) for key in (5, ())),
        ("checks", ("all",), True),
    ],
)
def test_a_file_with_a_nonsensical_entry_is_not_used(folder: Path, kind: str, key: Any, entry: Any) -> None:
    document = _tables.Table({KEY: {"best": "native"}}).to_json(_tables.facts(PLACE))
    document[kind][repr(key)] = entry
    path = _tables.cache_file(PLACE)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(document))
    with pytest.warns(UserWarning, match="ignores"):
        assert _tables.table(PLACE).choices == {}


def test_what_a_gpu_computes_wrong_is_said_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 3)
    good, bad, all_of_it = ("tile", 3, 0, 64, 64, 64), ("tile", 3, 0, 128, 128, 64), ("all",)
    op = ("op", "stem_fwd")
    calls: list[str] = []
    answer = {good: "right", bad: "wrong", op: "CUDA error: an illegal memory access"}

    def compare(library: Any, kernel: Any, place: torch.device, known: Any) -> dict[Any, str]:
        assert place == device and kernel("stem_fwd") is not None
        assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        assert not isinstance(torch.empty(1), FakeTensor)
        calls.append("compared")
        return answer

    monkeypatch.setattr(_tables._first_use, "compare", compare)
    monkeypatch.setattr(_tables._library.cuda, "loaded", SimpleNamespace(fused_cnn_problem_values=lambda: 12))
    refused = lambda library, problem, tile: calls.append(f"{problem[:2]} {tile}")  # noqa: E731
    monkeypatch.setattr(_tables._library, "refuse_tile", refused)
    monkeypatch.setattr(_tables._library, "withdraw", lambda *what: calls.append(" ".join(what)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    facts = {**_tables.facts(PLACE), "device": "NVIDIA Elsewhere"}
    monkeypatch.setattr(_tables, "facts", lambda device: facts)
    monkeypatch.setattr(_tables, "usable", lambda backend, device: True)
    refusals = ["(3, 3) (0, 128, 128, 64)", *(f"{name} native cuda" for name in _tables._first_use.POOLS)]

    capturing = True  # a comparison would break the capture
    assert not _tables.table(device).checks and not calls
    capturing = False
    _tables.forget()
    # A warning that is an error comes when all is kept.
    said = (
        r"on this NVIDIA Elsewhere .*tile 128 x 128 x 64\) gives other results(.|\n)*"
        "the kernel of stem_fwd does not run .CUDA error: an illegal memory access"
    )
    with warnings.catch_warnings(), torch.autocast("cpu"), FakeTensorMode():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=said):
            _tables.table(device)
    assert sorted(calls) == sorted(["compared", *refusals])
    calls.clear()
    left = answer[op]
    assert _tables.table(device).checks == {bad: "wrong", op: left}  # and nothing of what came behind an error
    # An error of the moment is no verdict: the next call tries again, a few times.
    answer = {}
    _tables.forget()
    for _ in range(20):
        _tables.table(device)
    assert 1 < calls.count("compared") <= _tables.PATIENCE

    # Another process: it goes on where the first could not, and never runs again what was wrong.
    calls.clear()
    answer = {all_of_it: "right"}
    _tables.forget()
    assert _tables.table(device).checks == {bad: "wrong", op: left, **answer}
    assert sorted(calls[:-1]) == sorted(refusals) and calls[-1] == "compared"
    calls.clear()
    _tables.forget()
    _tables.table(device)
    assert sorted(calls) == sorted(refusals)


def test_a_gpus_first_use_when_the_interpreter_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert _tables._first_use.on_its_own(lambda: pytest.fail("ran")) == {}
    with pytest.raises(ZeroDivisionError):
        _tables._first_use.on_its_own(lambda: {("all",): str(1 // 0)})


def test_a_table_of_other_sources_is_another_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tables.save(
        _tables.cache_file(PLACE), _tables.Table({KEY: {"best": "reference", "seconds": {}}}), _tables.facts(PLACE)
    )
    assert _tables.table(PLACE).choices
    changed = {**_tables.facts(PLACE), "sources": "changed"}
    monkeypatch.setattr(_tables, "facts", lambda device: changed)
    _tables.forget()
    assert not _tables.table(PLACE).choices


def test_an_interrupted_save_leaves_the_old_table_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, found = _tables.cache_file(PLACE), _tables.facts(PLACE)
    _tables.save(path, _tables.Table({KEY: {"best": "reference", "seconds": {}}}), found)
    before = path.read_bytes()

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_tables.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        _tables.save(path, _tables.Table({("other",): {"best": "native", "seconds": {}}}), found)
    assert path.read_bytes() == before
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".lock"]


def test_processes_that_save_at_once_lose_nothing(folder: Path) -> None:
    code = (
        "import sys, torch; from fused_cnn import _tables as t\n"
        "cpu = torch.device('cpu')\n"
        "for i in range(5):\n"
        "    entries = t.Table({(sys.argv[1], i): {'best': 'native', 'seconds': {}}})\n"
        "    t.save(t.cache_file(cpu), entries, t.facts(cpu))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(i)]) for i in range(4)]
    assert [p.wait(120) for p in running] == [0] * 4
    (path,) = folder.glob("*.json")
    document = json.loads(path.read_text())
    assert set(document["choices"]) == {repr((str(p), i)) for p in range(4) for i in range(5)}


def test_shipped_tables_hold_for_these_sources() -> None:
    """A change of a kernel makes what was measured before worthless: measure again, or take the table out."""
    for path in (Path(fused_cnn.__file__).parent / "tables").glob("*.json"):
        document = json.loads(path.read_text())
        assert document["sources"] == _tables.source_hash("cuda" if document["driver"] else "cpu"), path.name
        _tables.Table.from_json(document, {})


def test_a_strided_call_and_a_list_of_branches_have_keys_that_json_keeps(folder: Path, reference_wins: None) -> None:
    x = torch.randn(2, 8, 6, 6, device=DEVICE)
    bn = fused_cnn.ops.BatchNormArgs(*(torch.rand(8, device=DEVICE) for _ in range(4)))

    def model(t: Tensor) -> Tensor:
        return bn_relu_concat(
            [max_pool2d(t[:, :, ::2], 3, 1, 1), max_pool2d(t[:, :, 1::2], kernel_size=3, stride=1, padding=1)], [bn, bn]
        )

    measured = tuning.tune(model, x)
    assert {key[0] for key in measured.choices} == {"max_pool2d", "bn_relu_concat"}
    again = _tables.load(_tables.cache_file(PLACE), _tables.facts(PLACE))
    assert again.choices.keys() == measured.choices.keys()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("tuned", [False, True])
def test_calls_in_any_form_and_on_stand_ins_find_their_way(
    tuned: bool, monkeypatch: pytest.MonkeyPatch, reference_wins: None
) -> None:
    x, weight = torch.randn(1, 8, 4, 4, device=DEVICE), torch.randn(8, 8, 1, 1, device=DEVICE)
    if tuned:
        tuning.tune(lambda t: add_relu(max_pool2d(t, 1), t), x)
    assert max_pool2d(kernel_size=2, x=x).shape == (1, 8, 2, 2)
    assert conv1x1_bias_relu(bias=None, stride=2, x=x, weight=weight).shape == (1, 8, 2, 2)
    assert add_relu(x.to("meta"), x.to("meta")).device.type == "meta"
    with pytest.raises(ValueError, match="at least one"):
        fused_cnn.ops.concat_bias_relu([])
    with FakeTensorMode() as mode:
        assert add_relu(mode.from_tensor(x), mode.from_tensor(x)).shape == x.shape
    traced = make_fx(lambda t: add_relu(t, 2 * t), tracing_mode="symbolic")(x)
    torch.testing.assert_close(traced(x), add_relu(x, 2 * x))


@pytest.mark.usefixtures("folder", "reference_wins")
def test_a_change_of_the_tables_compiles_nothing_again() -> None:
    x, counter = torch.randn(1, 8, 4, 4, device=DEVICE), CompileCounter()
    compiled = torch.compile(lambda t: add_relu(t, 2 * t), fullgraph=True, backend=counter)
    compiled(x)
    tuning.tune(lambda t: add_relu(t, 2 * t), x)
    compiled(x)
    add_relu(x, x)
    compiled(x)
    assert counter.frame_count == 1


def test_a_backend_that_is_not_built_here_is_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 8, 4, 4, device=DEVICE)
    _tables.save(
        _tables.cache_file(PLACE), _tables.Table({KEY: {"best": "triton", "seconds": {}}}), _tables.facts(PLACE)
    )
    monkeypatch.setattr(fused_cnn._backends._library, "has_kernel", lambda op, backend, device: backend != "triton")
    torch.testing.assert_close(add_relu(x, x), torch.relu(2 * x))


@pytest.mark.parametrize(
    "error", [RuntimeError("Could not determine home directory."), PermissionError("not yours")], ids=repr
)
def test_without_a_readable_home_the_heuristics_decide(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class NoHome(type(Path())):  # type: ignore[misc]
        def read_text(self, *args: Any) -> str:
            raise error

    def cache_dir() -> Path:
        if isinstance(error, RuntimeError):
            raise error
        return NoHome("/root/.cache")

    monkeypatch.setattr(_tables, "cache_dir", cache_dir)
    _tables.forget()
    x = torch.randn(1, 8, 4, 4, device=DEVICE)
    torch.testing.assert_close(add_relu(x, x), torch.relu(2 * x))
    _tables.forget()


@pytest.mark.usefixtures("folder", "reference_wins")
def test_expanded_tensors_and_autocast_are_measured_as_they_were_called() -> None:
    x, weight = torch.randn(2, 8, 4, 4, device=DEVICE), torch.randn(8, 8, 1, 1, device=DEVICE)

    def model(t: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            y = conv1x1_bias_relu(t, weight)
        return add_relu(y, y[:, :1].expand(y.shape))

    modes = {key[0]: key[1] for key in tuning.tune(model, x).choices}
    assert modes == {"conv_bias_relu": "inference in bfloat16", "add_relu": "inference"}


@pytest.mark.usefixtures("folder")
def test_what_does_not_run_is_no_candidate(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("out of shared memory")

    timed = tuning._seconds({"good": lambda: None, "bad": fail}, PLACE)
    assert timed.keys() == {"good"}
    with pytest.raises(RuntimeError, match="no candidate runs"):
        tuning._seconds({"bad": fail}, PLACE)


@pytest.mark.usefixtures("folder")
def test_an_interrupted_run_keeps_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(variants: dict[Any, Any], device: torch.device) -> dict[Any, float]:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return dict.fromkeys(variants, 1.0)

    done: list[int] = []
    monkeypatch.setattr(tuning, "_seconds", seconds)
    with pytest.raises(KeyboardInterrupt):
        tuning.tune(lambda t: add_relu(max_pool2d(t, 1), t), torch.randn(1, 8, 4, 4, device=DEVICE))
    assert [key[0] for key in _tables.load(_tables.cache_file(PLACE), _tables.facts(PLACE)).choices] == ["max_pool2d"]


@pytest.mark.skipif("triton" not in backends(), reason="Triton is not installed")
@pytest.mark.usefixtures("folder")
def test_problems_with_other_candidates_have_other_keys() -> None:
    """A pool's product and a strided convolution's of the same sizes."""
    x, wide = torch.randn(1, 16, 4, 4, device=DEVICE), torch.randn(1, 16, 8, 8, device=DEVICE)
    weights = [torch.randn(8, c, k, k, device=DEVICE) for c, k in ((16, 1), (16, 1), (8, 3), (16, 1), (8, 3), (16, 1))]
    biases = [torch.zeros(8, device=DEVICE)] * 6

    def model(t: Tensor, wide: Tensor) -> Tensor:
        block = fused_cnn.ops.inception(t, weights, biases)
        return block[:, :8] + conv1x1_bias_relu(wide, weights[0], biases[0], stride=2)

    measured = tuning.tune(model, x, wide, backends=("reference", "triton"))
    assert {key[0] for key in measured.choices} == {"inception", "conv_bias_relu"}


def test_the_command_measures_a_network_and_saves_the_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("skimage")
    out = tmp_path / "table.json"
    assert run(["tune", "resnet18", "--size", "32", "--json", "--out", str(out)]) == 0
    shown = json.loads(capsys.readouterr().out)
    saved = json.loads(out.read_text())
    assert Path(shown["file"]).exists() and shown["choices"] == saved["choices"] != {}
    assert {entry["best"] for entry in saved["choices"].values()} <= {"reference", "native", "triton"}
    assert run(["tune", "no_such_network"]) == 2
