"""`make sanitize`: the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

A copy of this checkout in out/sanitize is compiled with both, at -O1, which takes a quarter of the time, and
there the fuzz of the ops' arguments and the tests of the ops and of their memory run. The first finding ends its
process, and this with an error. Later runs compile what changed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "sanitize"
COPIED = ("csrc", "fused_cnn", "tests", "setup.py", "pyproject.toml", "LICENSE", "README.md")
FLAGS = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
# Python's memory is never all freed, and PyTorch frees over-aligned memory as it likes.
ASAN = ("detect_leaks=0", "alloc_dealloc_mismatch=0", "allocator_may_return_null=1", "max_allocation_size_mb=4096")
TESTS = ("tests/test_arguments.py", "tests/test_memory.py", "tests/ops")
# Triton's interpreter has no kernels of ours, and checked_memory has its own.
LEFT_OUT = "not triton and not checked_memory and not simt"


def copied(source: Path, target: Path) -> None:
    """The same files with the same times, by which the build knows what changed."""
    if source.is_file():
        shutil.copy2(source, target)
        return
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for old in [path for path in target.rglob("*") if path.is_file() and path.suffix != ".so"]:
        if not (source / old.relative_to(target)).exists():
            old.unlink()
    shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)


def runtime(compiler: str, name: str) -> str:
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def main() -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        copied(ROOT / name, OUT / name)
    compiler = os.environ.get("CXX") or "g++"
    wrapper = OUT / "compiler"
    wrapper.write_text(f'#!/bin/sh\nexec {compiler} "$@" {FLAGS}\n')
    wrapper.chmod(0o755)
    built = {**os.environ, "CXX": str(wrapper), "FORCE_CUDA": "0"}
    subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=OUT, env=built, check=True)
    libraries = [runtime(compiler, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": ":".join(ASAN),
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(OUT),
        "OMP_WAIT_POLICY": "passive",
    }
    # -s: what a sanitizer says as it ends the process would be lost with what pytest holds back.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-k", LEFT_OUT, *TESTS, *sys.argv[1:]]
    return subprocess.run(command, cwd=OUT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
