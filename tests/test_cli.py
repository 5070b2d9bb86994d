"""The command line: exit codes, JSON that parses, errors of one line, and the main job on one small network."""

import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE

from fused_cnn import cli
from fused_cnn import optimize as optimized_for
from fused_cnn.bench import numbers, verify
from fused_cnn.bench.benches import Prepared
from fused_cnn.bench.report import rewrite
from fused_cnn.measure import Work

needs_pictures = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torchvision", "skimage", "matplotlib")),
    reason="verify needs torchvision, scikit-image and matplotlib",
)
SUFFIX = "-cuda" if DEVICE == "cuda" else ""  # of tables and plots
COMMANDS = ("info", "summary", "verify", "optimize", "bench", "profile", "report")
SMALL = ("--model", "resnet18", "--size", "64", "--batch", "8", "--seconds", "0")


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(list(arguments))
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_info_lists_every_backend_with_its_state(capfd: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capfd, "info", "--json")
    facts = json.loads(text)
    assert code == 0
    assert {(b["backend"], b["device"]) for b in facts["backends"]} == {
        (b, d) for b in ("reference", "native", "triton") for d in ("cpu", "cuda")
    }
    assert all(b["on"] or (b["reason"] and b["hint"]) for b in facts["backends"])
    assert (
        facts["build"]["_C.so"]["compiler"]
        and facts["versions"]["torch"] == torch.__version__
        and facts["devices"]["cpu"]
    )


def test_info_prints_tables(capfd: pytest.CaptureFixture[str]) -> None:
    code, text, errors = run(capfd, "info")
    assert code == 0 and errors == ""
    assert all(word in text for word in ("Backends", "Build", "Versions", "Devices", "Cache"))


def test_no_command_prints_help(capfd: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capfd)
    assert code == 0 and all(name in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_json_and_explains_itself(capfd: pytest.CaptureFixture[str], command: str) -> None:
    code, text, _ = run(capfd, command, "--help")
    assert code == 0 and "--json" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "nothing"),
        (["info", "--nothing"], "--nothing"),
        (["summary", "resnet5O"], "did you mean resnet50"),
        (["verify", "--backend", "cudnn"], "--backend must be auto"),
        (["verify", "--dtype", "int8"], "--dtype must be one of float32"),
        (["verify", "--batch", "0"], "batch"),
        (["verify", "--image", "nowhere.png"], "nowhere.png"),
        (["verify", "--image", __file__], "cannot be read as a picture"),
        (["verify", "--model", "resnet5O"], "resnet5O"),
        (["verify", "--model", "mobilenet_v2", "--size", "64"], "nothing in MobileNetV2 can be fused"),
        (["verify", "--model", "inception_v3", "--size", "64"], "inception_v3 does not run on 64 x 64 pixels"),
        (["optimize", "resnet5O"], "resnet5O"),
        (["optimize", "resnet18", "--dtype", "int8"], "--dtype must be one of float32"),
        (["optimize", "resnet18", "--backend", "cudnn"], "--backend must be auto"),
        (["optimize", "resnet18", "--batch", "0"], "batch"),
        (["bench", "everything"], "everything"),
        (["bench", "ops", "--op", "nothing"], "no such op"),
        (["profile", "--variant", "quick"], "--variant must be one of eager"),
        (["profile", "--pass", "backward"], "--pass must be one of inference"),
        (["report", "nowhere.json"], "nowhere.json"),
        (["report", __file__], "is not a result"),
    ],
    ids=lambda value: " ".join(value).replace("/", "_") if isinstance(value, list) else "",
)
@needs_pictures
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    capfd: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    code, text, errors = run(capfd, *arguments)
    last = errors.strip().splitlines()[-1]
    assert code == 2 and text == ""
    assert last.startswith("fused-cnn: ") and says in last and "Traceback" not in errors


def test_an_internal_error_is_one_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(sys.modules["fused_cnn.cli.info"], "collect", broken)  # the package's attribute is the command
    code, _, errors = run(capfd, "info")
    assert code == 3 and errors == "fused-cnn: internal error: RuntimeError: first line second line\n"
    with pytest.raises(RuntimeError, match="first line"):
        cli.run(["--traceback", "info"])


def test_a_missing_package_says_how_to_get_it(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    code, _, errors = run(capfd, "verify", *SMALL)
    assert code == 2 and "this command needs torchvision" in errors and "make venv" in errors


def test_summary_json_has_the_papers_rows(capfd: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capfd, "summary", "googlenet_paper", "--json")
    found = json.loads(text)
    names = [row["name"] for row in found["rows"]]
    assert code == 0 and found["model"] == "googlenet_paper"
    blocks = ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
    assert [n for n in names if n.startswith("inception")] == [f"inception_{n}" for n in blocks]
    assert all({"type", "output_size", "params", "macs"} <= row.keys() for row in found["rows"])
    assert found["total"]["params"] == sum(row["params"] or 0 for row in found["rows"])


def test_summary_prints_a_table(capfd: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capfd, "summary", "resnet18")
    assert code == 0 and "conv1" in text and "total" in text


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp("verify")
    return cli.run(["verify", *SMALL, "--train", "--out", str(folder)]), folder


@needs_pictures
def test_verify_agrees_and_says_what_it_measured(verified: tuple[int, Path]) -> None:
    code, folder = verified
    found = json.loads((folder / "verify.json").read_text())
    network = found["models"]["resnet18"]
    assert code == 0 and found["ok"]
    assert (folder / "verify.png").read_bytes().startswith(b"\x89PNG")
    assert len(network["fused"]) >= 9 and network["skipped"] == []  # eight blocks and the stem
    assert len(network["training"]) == len(network["training_float64"]) > 100
    assert network["scores"]["error"] <= network["scores"]["bound"]
    assert {s["stage"] for s in network["stages"]} == {"stem", "layer1", "layer2", "layer3", "layer4", "head"}
    traffic = network["traffic"]["eval"]
    assert traffic["minimum"]["bytes"] < traffic["fused"]["bytes"] < traffic["eager"]["bytes"]
    assert traffic["fused"]["launches"] < traffic["eager"]["launches"]
    assert {row["backend"] for row in network["backends"]["eval"]} >= {"native"}
    assert network["train"]["saved_bytes"]["fused"] <= network["train"]["saved_bytes"]["eager"]
    optimized, time = network["scores_optimized"], network["time"]["eval"]
    assert optimized["ok"] and optimized["bound"] == network["scores"]["bound"] and optimized["difference"] > 0
    assert time["optimized"]["samples"] == time["eager"]["samples"] and "optimized" not in network["train"]["time"]
    if DEVICE == "cpu":  # all is one call of PyTorch's dispatcher, in which the fused network's kernels run
        assert [op["calls"] for op in traffic["optimized"]["by_op"].values()] == [1]
        assert traffic["optimized"]["launches"] == traffic["fused"]["launches"]


@needs_pictures
def test_report_makes_tables_and_plots_and_updates_marked_text(
    verified: tuple[int, Path], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        f"before\n<!-- table:verify{SUFFIX} -->\nold\n<!-- /table -->\n<!-- table:ran -->\n<!-- /table -->\nafter\n"
    )
    result = str(verified[1] / "verify.json")
    code, text, _ = run(capfd, "report", result, "--update", str(page), "--out", str(tmp_path), "--json")
    found = json.loads(text)
    assert (
        code == 0 and found["updated"] == {str(page): ["ran", f"verify{SUFFIX}"]} and Path(found["plots"][0]).exists()
    )
    assert "| resnet18 |" in page.read_text() and "old" not in page.read_text()
    assert page.read_text().startswith("before\n") and page.read_text().endswith("<!-- /table -->\nafter\n")


def test_report_keeps_tables_that_it_was_not_given(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- table:ops -->\nold\n<!-- /table -->\n<!-- table:models -->\nkept\n<!-- /table -->\n")
    assert rewrite(page, {"ops": "new\n"}) == ["ops"]
    assert "new" in page.read_text() and "kept" in page.read_text() and "old" not in page.read_text()


@needs_pictures
def test_verify_notices_wrong_numbers(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pair_of = numbers.Pair.of.__func__  # type: ignore[attr-defined]

    def spoiled(cls: type, model: Any, backend: str | None) -> numbers.Pair:
        pair: numbers.Pair = pair_of(cls, model, backend)
        pair.fused.layer3[0].bn1.weight.data.mul_(1.001)
        return pair

    monkeypatch.setattr(numbers.Pair, "of", classmethod(spoiled))
    code, text, _ = run(capfd, "verify", *SMALL, "--out", str(tmp_path), "--json")
    found = json.loads(text)
    assert code == 1 and not found["ok"]
    assert not found["models"]["resnet18"]["scores"]["ok"]
    assert any(not row["ok"] for row in found["models"]["resnet18"]["training_float64"])
    assert found["models"]["resnet18"]["scores_optimized"]["ok"]


def off(model: Any, *args: Any, **kwargs: Any) -> Any:
    """optimize, with one weight that is not the model's."""
    model = copy.deepcopy(model)
    model.layer3[0].bn1.weight.data.mul_(1.01)
    return optimized_for(model, *args, **kwargs)


@needs_pictures
def test_verify_notices_wrong_numbers_of_the_optimized_network(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(verify, "optimize", off)
    code, text, _ = run(capfd, "verify", *SMALL, "--out", str(tmp_path))
    assert code == 1 and "do NOT agree" in text
    found = json.loads((tmp_path / "verify.json").read_text())["models"]["resnet18"]
    assert found["scores"]["ok"] and not found["scores_optimized"]["ok"] and not found["ok"]


@needs_pictures
def test_optimize_prints_a_plan_for_each_batch(capfd: pytest.CaptureFixture[str]) -> None:
    options = ("resnet18", "--batch", "1", "--batch", "3", "--size", "64", "--dtype", "bfloat16")
    code, text, _ = run(capfd, "optimize", *options)
    assert code == 0 and text.count("started in") == text.count("the numbers agree: ") == 2
    assert "resnet18, 3 x 3 x 64 x 64, bfloat16" in text and "3x64x32x32" in text and "1x64x32x32" in text
    assert all(word in text for word in ("layer1", "of the limit", "activations: "))
    assert DEVICE == "cuda" or ("residual block" in text and "MB without sharing" in text)


@needs_pictures
def test_optimize_json_has_steps_memory_and_what_was_not_fused(capfd: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capfd, "optimize", "mobilenet_v2", "--size", "64", "--dtype", "bfloat16", "--json")
    found = json.loads(text)
    assert code == 0 and found["ok"] and found["model"] == "mobilenet_v2" and found["versions"]["torch"]
    (plan,) = found["plans"]
    assert plan["batch"] == 1 and plan["start"] > 0 and plan["scores"]["ok"]
    assert plan["scores"]["error"] > 1e-3  # it does compute in bfloat16
    assert [row["step"] for row in plan["rows"]] == list(range(1, len(plan["rows"]) + 1))
    assert any(row["layer"].startswith("features.18") and row["why"] for row in plan["rows"])
    assert {"arena", "without_overlap"} <= plan.keys() and any("nothing was fused" in note for note in plan["notes"])


@needs_pictures
def test_optimize_notices_wrong_numbers(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fused_cnn.cli.optimize"], "optimized_for", off)
    code, text, _ = run(capfd, "optimize", "resnet18", "--size", "64")
    assert code == 1 and "the numbers do NOT agree: " in text


def test_bench_saves_rows_that_report_reads(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = ("--op", "add_relu", "--dtype", "float32", "--batch", "1", "--seconds", "0", "--out", str(file))
    code, _, errors = run(capfd, "bench", "ops", *options)
    found = json.loads(file.read_text())
    assert code == 0 and "add_relu" in errors  # progress
    assert len(found["rows"]) == 8 and found["left_out"] == 0
    for row in found["rows"]:
        memory, products = (
            row["bytes"] / found["ceilings"]["copy"],
            row["flops"] / found["ceilings"]["product"]["float32"],
        )
        in_cache = row["bytes"] < found["ceilings"]["cache"]
        assert row["limit"] == (products if in_cache else max(memory, products)) and row["flops_done"] == row["flops"]
        assert row["bound"] == ("products" if memory <= products else "cache" if in_cache else "memory")
        assert row["share_of_limit"]["fused"] == pytest.approx(row["limit"] / row["times"]["fused"]["median"])
    assert set(found["sources"]["native"]) >= {"conv", "batch_norm"}
    code, text, _ = run(capfd, "report", str(file), "--out", str(tmp_path))
    assert code == 0 and text.count("| add_relu |") >= 8 and "rows." in text
    assert (tmp_path / f"roofline{SUFFIX}.png").read_bytes().startswith(b"\x89PNG")


def test_bench_says_how_many_rows_its_minutes_left_out(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = ("--op", "add_relu", "--dtype", "float32", "--batch", "1", "--minutes", "0", "--out", str(file))
    code, text, _ = run(capfd, "bench", "ops", *options)
    assert code == 0 and "8 of 8 rows were left out" in text
    assert json.loads(file.read_text())["left_out"] == 8


def test_a_peer_that_fails_or_computes_something_else_is_left_out_with_the_reason() -> None:
    def fails() -> Work:
        raise RuntimeError("no engine")

    work = Prepared({"eager": lambda: torch.ones(3)}, bytes=1, flops=1)
    work.add_peers(
        {"broken": fails, "other": lambda: lambda: torch.zeros(3), "same": lambda: lambda: torch.ones(3)}, bound=0.1
    )
    assert set(work.variants) == {"eager", "same"}
    assert (
        work.counted["absent"]["broken"] == "RuntimeError: no engine"
        and "1.0e+00 off eager's" in work.counted["absent"]["other"]
    )


@needs_pictures
def test_bench_times_a_network_and_counts_its_memory(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "models.json"
    options = (
        "--model",
        "resnet18",
        "--dtype",
        "float32",  # PyTorch takes twice as long in bfloat16 where the processor has none
        "--batch",
        "2",
        "--size",
        "64",
        "--seconds",
        "0",
        "--out",
        str(file),
    )
    code, text, _ = run(capfd, "bench", "models", *options)
    inference, training = json.loads(file.read_text())["rows"]
    assert code == 0 and inference["pass"] == "inference" and training["pass"] == "training step"
    assert inference["launches"]["fused"] < inference["launches"]["eager"]
    assert "optimized" in inference["times"] and "optimized ms" in text and "optimized" not in training["times"]
    if DEVICE == "cpu":  # on a GPU it is a graph, of which nothing is counted
        assert inference["launches"]["optimized"] == inference["launches"]["fused"]
        assert inference["traffic"]["optimized"] > inference["bytes"] and inference["peak"]["optimized"] > 1 << 20
    for row in (inference, training):
        assert row["flops"] > 1e8
        assert row["bytes"] > 0 and row["peak"]["fused"] > 0
        # Traffic is counted by the CPU kernels' costs.
        assert DEVICE == "cuda" or row["bytes"] < row["traffic"]["fused"]
    if DEVICE == "cuda":  # on a CPU so small a step is PyTorch's
        assert training["launches"]["fused"] < training["launches"]["eager"]
        assert training["saved"]["fused"] < training["saved"]["eager"]
    code, text, _ = run(capfd, "report", str(file), "--out", str(tmp_path))
    assert code == 0 and text.count("| resnet18 |") == 6 and text.count("| optimized ms |") == 1
    plots = ("images", "memory", *(("traffic-inference", "traffic-training") if DEVICE == "cpu" else ()))
    assert all((tmp_path / f"{name}{SUFFIX}.png").exists() for name in plots)


@needs_pictures
def test_profile_lists_what_ran_and_report_tables_it(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    options = (
        "--model",
        "resnet18",
        "--dtype",
        "float32",
        "--batch",
        "2",
        "--size",
        "64",
        "--seconds",
        "0",
        "--host",
        "--out",
        str(file),
    )
    code, text, _ = run(capfd, "profile", *options, "--variant", "eager", "--variant", "fused")
    found = json.loads(file.read_text())
    assert code == 0 and text.count("resnet18") == 4 and found["kind"] == "kernels" and found["left_out"] == 0
    rows = {(row["pass"], row["variant"]): row for row in found["rows"]}
    assert set(rows) == {(p, v) for p in ("inference", "training step") for v in ("eager", "fused")}
    for row in rows.values():
        times = [microseconds for *_, microseconds in row["kernels"]]
        assert times == sorted(times, reverse=True) and 0 < sum(times) <= row["busy_ms"] * 1e3 * 1.001
        assert row["launches"] >= sum(launches for _, launches, _ in row["kernels"]) and row["ms"] > 0
        where, calls, seconds = row["host"][0]
        assert where and calls > 0 and seconds > 0
    assert rows["inference", "fused"]["launches"] < rows["inference", "eager"]["launches"]
    longest = (
        rows["inference", "fused"]["kernels"][0][0] if DEVICE == "cuda" else "fused_cnn::residual_stage_packed_fwd"
    )
    assert any(name == longest for name, *_ in rows["inference", "fused"]["kernels"])
    code, text, _ = run(capfd, "report", str(file))
    assert (
        code == 0 and f"## kernels-resnet18-inference{SUFFIX}" in text and (DEVICE == "cuda" or f"`{longest}`" in text)
    )


def test_profile_counts_what_its_minutes_left_out(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    code, text, _ = run(capfd, "profile", "--minutes", "0", "--out", str(file))
    assert code == 0 and "16 of 16 rows were left out" in text and json.loads(file.read_text())["left_out"] == 16
