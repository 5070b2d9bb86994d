"""scripts/gpu.sh, every stage on a small piece of its work, on this machine, and what it says of a stage that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEVICE

from fused_cnn.cli.report import load_all

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("build", "test", "sanitize", "tune", "bench-ops", "bench-models", "bench-train")


def gpu_sh(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    command = ["bash", str(ROOT / "scripts" / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=kept | {"PATH": path}, timeout=900)


@pytest.mark.skipif(DEVICE == "cuda", reason="there the stages themselves run, this test in one of them")
def test_every_stage_runs_and_leaves_one_log_and_one_json(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    done = gpu_sh("all", str(tmp_path), "--dry")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {f"{stage}.{end}" for stage in STAGES for end in ("log", "json")}
    found = {stage: json.loads((tmp_path / f"{stage}.json").read_text()) for stage in STAGES}
    assert all(result["exit_code"] == 0 and not result["failed"] for result in found.values())
    assert found["test"]["tests"]["tests"] > 0
    ran = found["test"]["result"]["ran"]
    assert {"op": "add_relu", "backend": "native", "dtype": "float32", "passed": True} in ran
    assert all(found[stage]["result"]["rows"] for stage in STAGES if stage.startswith("bench"))
    assert load_all([tmp_path]) == []  # a dry run is no evidence


def test_a_stage_that_fails_names_what_failed(tmp_path: Path) -> None:
    done = gpu_sh("bench-ops", str(tmp_path), "--dry", "--", "--backend", "nonsense")
    assert done.returncode == 2 and "failed: the stage's command itself: see the log's end" in done.stdout
    assert "nonsense" in done.stdout  # the log's last lines
    assert json.loads((tmp_path / "bench-ops.json").read_text())["exit_code"] == 2


@pytest.mark.parametrize("arguments", [(), ("build",), ("polish", "out"), ("build", "out", "--what")])
def test_wrong_use_prints_how_it_is_used(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = gpu_sh(*(a if a != "out" else str(tmp_path) for a in arguments))
    assert done.returncode == 2 and "scripts/gpu.sh STAGE OUTDIR" in done.stderr and "bench-train" in done.stderr
