"""One lost context fails one test: pytest in processes of its own, with a torch in which only the synchronisation is
left."""

import os
import subprocess
import sys
from pathlib import Path

TORCH = """
class cuda:
    lost = False

    def is_available():
        return True

    def synchronize():
        if cuda.lost:
            raise RuntimeError("CUDA error: an illegal address\\nand advice")
"""
TESTS = """
import pytest, torch

@pytest.mark.parametrize("i", range(12))
def test_it(i):
    torch.cuda.synchronize()
    torch.cuda.lost = i == 2
"""


def run(folder: Path, *options: str) -> str:
    (folder / "torch.py").write_text(TORCH)
    (folder / "test_sample.py").write_text(TESTS)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": f"{folder}:{Path(__file__).parent}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "lost_context", *options, "test_sample.py"]
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return found.stdout + found.stderr


def test_under_xdist_a_new_worker_runs_the_rest(tmp_path: Path) -> None:
    found = run(tmp_path, "-p", "xdist", "-n", "2")
    assert "test_sample.py::test_it[2] lost the CUDA context: CUDA error: an illegal address\n" in found
    failed = {line.split()[1] for line in found.splitlines() if line.startswith("FAILED")}
    assert failed == {"test_sample.py::test_it[2]"} and "11 passed" in found, found


def test_in_one_process_the_session_stops_and_says_why(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert "test_it[2] lost the CUDA context: CUDA error: an illegal address; with -n the tests after it" in found, (
        found
    )
    assert "1 failed, 2 passed" in found, found
