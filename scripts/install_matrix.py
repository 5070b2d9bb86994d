"""`make install-matrix`: `pip install -e .` as people do it, each way in a copy of this checkout and a virtual
environment of its own.

With and without nvcc, with and without build isolation, with and without CUTLASS's headers; after each, `fused-cnn
info` must say what was built, and an op must run. Objects are kept from one way to the next, so the first of each kind
takes the time.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from make_venv import TORCH
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RUN_AN_OP = (
    "import torch, fused_cnn.ops as ops; x = torch.ones(2, 8, 3, 3); "
    "assert ops.add_relu(x, -x, backend='native').eq(0).all()"
)


def main() -> int:
    cutlass = re.search(r"nvidia-cutlass==[\d.]+", (ROOT / "fused_cnn" / "_builds.py").read_text())
    assert cutlass is not None
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    table = Table("nvcc", "CUTLASS", "build isolation", "seconds", "CUDA part", "result", box=SIMPLE)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        checkout, venv = Path(folder) / "fused_cnn", Path(folder) / "venv"
        subprocess.run(["git", "clone", "-q", ROOT, checkout], check=True)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        python = str(venv / "bin" / "python")

        def pip(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
            command = [python, "-m", "pip", "-q", *arguments]
            return subprocess.run(
                command, capture_output=True, text=True, cwd=checkout, env={**os.environ, **variables}
            )

        pip("install", "setuptools>=77", "wheel", f"torch=={TORCH}").check_returncode()
        for cuda, headers, isolated in product((False, True), (False, True), (True, False)):
            if (cuda and not nvcc) or (headers and not cuda):
                continue
            for name in ("_C.so", "_C_cuda.so"):
                (checkout / "fused_cnn" / name).unlink(missing_ok=True)
            pip("install", "--no-deps", cutlass[0]) if headers else pip("uninstall", "-y", "nvidia-cutlass")
            start = time.perf_counter()
            done = pip("install", *([] if isolated else ["--no-build-isolation"]), "-e", ".", FORCE_CUDA=str(int(cuda)))
            seconds = time.perf_counter() - start
            built, wrong = "", done.stderr.strip()[-300:] if done.returncode else ""
            if not wrong:
                info = subprocess.run(
                    [venv / "bin" / "fused-cnn", "info", "--json"], capture_output=True, text=True, cwd=folder
                )
                wrong = info.stderr.strip()[-300:] if info.returncode else ""
                ran = subprocess.run([python, "-c", RUN_AN_OP], capture_output=True, text=True, cwd=folder)
                wrong = wrong or (ran.stderr.strip()[-300:] if ran.returncode else "")
                if not wrong:
                    facts = json.loads(info.stdout)
                    build, native = (
                        facts["build"],
                        {b["device"]: b for b in facts["backends"] if b["backend"] == "native"},
                    )
                    kernels = build["_C_cuda.so"] if cuda else {}
                    built = (
                        f"{kernels['cuda']} for {kernels['cuda_archs']}, CUTLASS {kernels['cutlass'] or 'none'}"
                        if cuda
                        else "none"
                    )
                    expected = {
                        "the CPU backend is on": native["cpu"]["on"],
                        "the CUDA library is there or not, as asked": isinstance(build["_C_cuda.so"], dict) == cuda,
                        "CUTLASS is named where it was used": bool(kernels.get("cutlass")) == headers,
                        "a reason why CUDA is off": native["cuda"]["on"]
                        or bool(native["cuda"]["reason"] and native["cuda"]["hint"]),
                    }
                    wrong = "; ".join(f"not so: {what}" for what, so in expected.items() if not so)
            failed += bool(wrong)
            yes = {True: "yes", False: "no"}
            table.add_row(
                yes[cuda],
                yes[headers],
                yes[isolated],
                f"{seconds:.0f}",
                built,
                wrong or "ok",
                style="red" if wrong else None,
            )
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
