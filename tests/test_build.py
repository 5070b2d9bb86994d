"""Building says in one line what is missing, and importing is quick, writes nothing and leaves the GPU alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = ("setup.py", "--quiet", "build_ext", "--inplace")
RUN = f"import runpy, sys; sys.argv = {list(BUILD)}; runpy.run_path('setup.py', run_name='__main__')"  # after a change by the test


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the build reads, so that no test builds in the project's own folder."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "fused_cnn").mkdir()
    (tmp_path / "fused_cnn" / "__init__.py").write_text("")
    return tmp_path


def build(tree: Path, *before: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, *(before or BUILD)]
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "TORCH_CUDA_ARCH_LIST", "FORCE_CUDA", "CUDA_HOME")}
    return subprocess.run(script, cwd=tree, env=kept | environment, capture_output=True, text=True, timeout=300)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_missing_compiler_is_named(tree: Path) -> None:
    line = last_line(build(tree, PATH="/nonexistent", FORCE_CUDA="0"))
    assert line.startswith("fused_cnn: no C++ compiler found") and "apt-get install g++" in line


def test_a_compiler_that_fails_says_what_is_needed(tree: Path) -> None:
    bad = tree / "cxx"
    bad.write_text('#!/bin/sh\n[ "$1" = --version ] && echo old 1.0 && exit 0\necho "unknown option -std=c++20" >&2; exit 1\n')
    bad.chmod(0o755)
    line = last_line(build(tree, CXX=str(bad), FORCE_CUDA="0", MAX_JOBS="1"))
    assert line.startswith("fused_cnn: compiling csrc/") and "a C++20 compiler" in line


def test_an_old_torch_is_named(tree: Path) -> None:
    old = tree / "old" / "torch"
    (old / "include").mkdir(parents=True)
    (old / "version.py").write_text("__version__ = '2.4.1'\n")
    script = f"import sysconfig; sysconfig.get_path = lambda *a, **k: {str(old.parent)!r}"
    line = last_line(build(tree, "-c", f"{script}; {RUN}", FORCE_CUDA="0"))
    assert line.startswith("fused_cnn: torch 2.4.1 is too old: install torch>=2.10")


def test_required_cuda_without_nvcc_is_named(tree: Path) -> None:
    line = last_line(build(tree, "-c", f"import shutil; shutil.which = lambda *a, **k: None; {RUN}", FORCE_CUDA="1"))
    assert line.startswith("fused_cnn: FORCE_CUDA=1, but nvcc was not found")


@pytest.mark.parametrize("archs", ["sm_80", "8", "8.0;ninety", "9.0a+PTX+PTX"])
def test_a_wrong_arch_list_is_named(tree: Path, archs: str) -> None:
    nvcc = tree / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.1'\n")
    nvcc.chmod(0o755)
    shutil.rmtree(tree / "csrc")  # nothing to compile: the list is what is looked at
    (tree / "csrc").mkdir()
    cxx = tree / "cxx"
    cxx.write_text('#!/bin/sh\nfor a; do [ "$last" = -o ] && : > "$a"; last=$a; done; echo c++ 14.0\n')
    cxx.chmod(0o755)
    line = last_line(build(tree, CUDA_HOME=str(tree), CXX=str(cxx), TORCH_CUDA_ARCH_LIST=archs))
    assert line.startswith("fused_cnn: TORCH_CUDA_ARCH_LIST has ") and "expected entries such as 8.0" in line


IMPORT = """
import sys, time, torch
start = time.perf_counter()
import fused_cnn
seconds = time.perf_counter() - start
for name in ("typer", "rich", "triton", "torchvision", "timm", "transformers", "matplotlib"):
    assert name not in sys.modules, name
assert not torch.cuda.is_initialized()
print(seconds)
"""


def test_import_is_quick_and_light(tmp_path: Path) -> None:
    """The best of five: other processes share the machine."""
    seconds = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", IMPORT], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
        if min(seconds) < 0.3:
            return
    raise AssertionError(f"import fused_cnn took {min(seconds):.2f} s beyond torch's own import")


def test_import_writes_no_file(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    environment = os.environ | home | {"PYTHONDONTWRITEBYTECODE": "1"}
    before = sorted(p for p in (ROOT / "fused_cnn").rglob("*") if "__pycache__" not in p.parts)
    subprocess.run([sys.executable, "-c", "import fused_cnn"], cwd=tmp_path, env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
    assert sorted(p for p in (ROOT / "fused_cnn").rglob("*") if "__pycache__" not in p.parts) == before
