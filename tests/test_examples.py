"""The examples of torch.compile, packages and ONNX, run as a user runs them, on a small network."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_without_python import CXX
from torch import nn

from fused_cnn import _library, unfuse_

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SMALL = ("--network", "resnet18", "--size", "64", "--seconds", "0")

pytestmark = pytest.mark.skipif(_library.cpu.loaded is None, reason="not built")
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
for package in ("torchvision", "PIL", "skimage"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs an example, which must succeed, and gives what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if sys.dont_write_bytecode:  # each process would compile all of torch once more
        environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("bytecode"))}

    def run(name: str, *arguments: str) -> str:
        command = [sys.executable, str(EXAMPLES / name), *SMALL, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def agreed(text: str) -> dict[str, float]:
    """How far scores are off eager's, by what an example calls them."""
    lines = re.findall(r"^(.*): the scores differ from eager's by (\S+) of the largest at most$", text, re.MULTILINE)
    return {what: float(off) for what, off in lines}


def timed(text: str) -> dict[str, list[str]]:
    """The variants that were timed, by batch; none took no time."""
    lines = re.findall(r"^batch (\d+): (.* ms)$", text, re.MULTILINE)
    found = {batch: re.findall(r"([\w. ]+?) (\d+\.\d) ms(?:, |$)", line) for batch, line in lines}
    assert all(float(ms) > 0 for variants in found.values() for _, ms in variants)
    return {batch: [name for name, _ in variants] for batch, variants in found.items()}


@needs_compiler
def test_one_compiled_program_takes_every_batch_but_one_image(run: Callable[..., str]) -> None:
    text = run("compile_fused.py", "--batch", "5", "--batch", "3", "--batch", "1")
    same = {f"batch {n}, the same program" for n in (2, 3, 5)}
    assert agreed(text).keys() == {*same, "batch 1, a program of its own"}
    assert "10 blocks fused" in text and "programs compiled: 2" in text
    assert timed(text) == {n: ["eager", "fused", "compiled"] for n in ("5", "3", "1")}


@needs_compiler
def test_packages_run_and_the_command_that_is_printed_has_its_files(run: Callable[..., str], tmp_path: Path) -> None:
    text = run("export_package.py", "--batch", "2", "--out", str(tmp_path / "a package"))
    assert agreed(text).keys() == {"plan.pt2", "network.pt2", "any_batch.pt2, batch 1", "any_batch.pt2, batch 2"}
    assert timed(text) == {"2": ["fused", "optimized", "network.pt2", "any_batch.pt2"]}
    (command,) = re.findall(r"^without Python .*: (run_package .*)$", text, re.MULTILINE)
    _, package, inputs, results, library = shlex.split(command)  # test_without_python.py runs such a command
    assert Path(package).is_file() and Path(library) == _library.cpu.file
    assert [t.shape for file in (inputs, results) for t in torch.load(file)] == [(2, 3, 64, 64), (2, 1000)]


def test_onnx_runtime_takes_every_batch(run: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    text = run("to_onnx.py", "--batch", "3", "--out", str(tmp_path / "network.onnx"))
    of_file = {f"network.onnx, batch {n}" for n in (1, 2, 3)}
    assert agreed(text).keys() == {"fused", "fused again", *of_file}
    assert timed(text) == {"3": ["fused", "ONNX Runtime"]}


def test_wrong_scores_end_an_example(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bias of thousands is another."""
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    monkeypatch.syspath_prepend(EXAMPLES)
    to_onnx = importlib.import_module("to_onnx")

    def changed(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            model.get_parameter("layer4.1.bn2.bias")[7] += 1
        return unfuse_(model)

    monkeypatch.setattr(to_onnx, "unfuse_", changed)
    with pytest.raises(SystemExit, match="fused again: that is more than 1e-03"):
        to_onnx.main("resnet18", 64, 2, tmp_path / "network.onnx", 0)
    assert agreed(capsys.readouterr().out)["fused"] < 1e-4
