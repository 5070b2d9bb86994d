"""`make torch-matrix`: the native libraries against every PyTorch that the README promises.

For each version the headers come out of its wheel; everything is compiled against them, the CPU part and, where nvcc
is, the CUDA part. Then, in an environment of its own for each version, every library made, whichever version it was
built against, must load and run an op, and under TESTED the ops', the modules' and fuse_'s tests run on the CPU. All of
it takes an hour on two cores and 10 GB for a while.

`--syntax` is what CI runs: the oldest and the newest version's headers, read by the host compiler for every source that
includes them, the CUDA ones by way of the stand-in in tests/simt. It takes a minute.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fused_cnn._sources import with_headers

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "torch-matrix"
VERSIONS = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1")
TESTED = ("2.11.0", "2.14.1")  # what GPU machines with CUDA 13 have, and the newest
ARCHS = "8.0;9.0a"
NEEDED = ("torch/include/", "torch/version.py", "torch/lib/libtorch_cpu.so", "torch/lib/libc10.so")
TOOLS = ("numpy<2.4", "pillow", "typer", "rich", "pytest", "pytest-xdist", "hypothesis", "expecttest", "timm")
LIBRARIES = ("_C.so", "_C_cuda.so")
LOAD = """
import torch, fused_cnn.ops as ops
from fused_cnn import _library
_library.cuda.load()
for library in (_library.cpu, *([_library.cuda] if _library.cuda.file.exists() else [])):
    assert library.error == "", library.error
    for op in library.facts["ops"].split():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_cnn::{op}", library.device_type.upper()), op
x, w = torch.randn(2, 8, 9, 9), torch.randn(8, 8, 3, 3, requires_grad=True)
y = ops.conv_bias_relu(x, w, residual=x, padding=1, backend="native")
torch.testing.assert_close(y, torch.relu(torch.nn.functional.conv2d(x, w, padding=1) + x))
y.sum().backward()
try:
    torch.ops.fused_cnn.add_relu_fwd(x[0], x[0])
except RuntimeError as error:
    assert "must have 4 dimensions" in str(error)
else:
    raise AssertionError("bad input was taken")
"""


def run(command: list[object], cwd: Path = ROOT, **environment: str) -> str:
    """What went wrong, or nothing."""
    text = [os.fspath(part) if isinstance(part, Path) else str(part) for part in command]
    done = subprocess.run(text, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})
    return (
        "" if done.returncode == 0 else (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}")
    )


def unpacked(version: str) -> Path:
    """The folder with torch/include, torch/lib and torch/version.py of a version, out of its wheel."""
    folder = OUT / version
    if not (folder / "torch" / "version.py").exists():
        wheels = OUT / "wheels"
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, f"torch=={version}"]
        wrong = run(download)
        if wrong:
            sys.exit(f"torch-matrix: torch {version} cannot be had: {wrong.splitlines()[-1]}")
        (wheel,) = wheels.glob(f"torch-{version}[-+]*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(NEEDED)])
        (folder / "torch" / "version.py").touch()  # last
        wheel.unlink()
    return folder


def reads_torch(path: Path) -> bool:
    """Whether a source includes PyTorch's headers, by itself or by way of the project's own."""
    return any("#include <torch/" in file.read_text() for file in with_headers(path))


def syntax(version: str) -> list[str]:
    """What the host compiler says of every source that includes a version's headers."""
    include = unpacked(version) / "torch" / "include"
    compiler = os.environ.get("CXX") or shutil.which("g++") or "clang++"
    stable = ["-std=c++20", "-fsyntax-only", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", include]
    simt = ["-x", "c++", "-DUSE_CUDA", "-DFUSED_CNN_GEMM_SM80=1", "-DFUSED_CNN_GEMM_SM90A=1", "-Itests/simt"]
    sources = [p for p in sorted((ROOT / "csrc").rglob("*.c*")) if p.suffix in (".cpp", ".cu") and reads_torch(p)]

    def check(path: Path) -> str:
        wrong = run([compiler, *stable, *(simt if path.suffix == ".cu" else []), "-Icsrc", path])
        return f"{path.relative_to(ROOT)}: {wrong}" if wrong else ""

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(filter(None, pool.map(check, sources)))
    print(f"torch-matrix: {len(sources)} sources read against torch {version}'s headers, {len(found)} fail", flush=True)
    return found


def built(version: str, checkout: Path) -> str:
    """Compile everything in `checkout` against a version's headers, and keep the libraries beside these."""
    cuda = "1" if shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin") else "0"
    folder = unpacked(version)
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    wrong = run(build, checkout, PYTHONPATH=str(folder), TORCH_CUDA_ARCH_LIST=ARCHS, FORCE_CUDA=cuda)
    for name in LIBRARIES if not wrong else ():
        if (checkout / "fused_cnn" / name).exists():
            shutil.copy(checkout / "fused_cnn" / name, folder)
    return wrong


def carry(version: str, checkout: Path) -> None:
    """Make the libraries that were built against a version those of the checkout."""
    for name in LIBRARIES:
        (checkout / "fused_cnn" / name).unlink(missing_ok=True)
        if (OUT / version / name).exists():
            shutil.copy(OUT / version / name, checkout / "fused_cnn")


def used(version: str, versions: list[str], checkout: Path) -> dict[str, str]:
    """In an environment with this torch: what is wrong with each library, and with the tests."""
    venv = OUT / "venv"
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    vision = f"torchvision==0.{int(version.split('.')[1]) + 15}.*"
    wrong = run([python, "-m", "pip", "install", "-qq", f"torch=={version}", vision, *TOOLS])
    if wrong:
        return {"environment": wrong}
    found = {}
    for other in versions:
        carry(other, checkout)
        found[f"libraries of {other}"] = run([python, "-c", LOAD], OUT, PYTHONPATH=str(checkout))
    if version in TESTED:
        carry(version, checkout)
        tests = [f"tests/test_{what}.py" for what in ("ops", "nn", "fuse")]
        command = [python, "-m", "pytest", "-q", "-n", "auto", "-p", "no:cacheprovider", *tests]
        found["tests"] = run(command, checkout, PYTHONPATH=str(checkout), OMP_WAIT_POLICY="passive")
    shutil.rmtree(venv)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="of torch; without any, all that are promised")
    parser.add_argument(
        "--syntax", action="store_true", help="read the oldest's and the newest's headers, build nothing"
    )
    arguments = parser.parse_args()
    if arguments.syntax:
        wrong = [line for version in (arguments.versions[0], arguments.versions[-1]) for line in syntax(version)]
        print("\n".join(wrong))
        return 1 if wrong else 0
    table = Table("torch", "what", "seconds", "result", box=SIMPLE)
    failed = 0

    def note(version: str, what: str, start: float, wrong: str) -> None:
        nonlocal failed
        failed += bool(wrong)
        seconds = f"{time.perf_counter() - start:.0f}"
        table.add_row(version, what, seconds, "ok" if not wrong else wrong[-600:], style="red" if wrong else None)
        print(f"torch-matrix: {version}, {what}: {'ok' if not wrong else wrong[-3000:]}", flush=True)

    OUT.mkdir(parents=True, exist_ok=True)
    checkout = OUT / "checkout"
    shutil.rmtree(checkout, ignore_errors=True)
    subprocess.run(["git", "clone", "-q", ROOT, checkout], check=True)
    for version in arguments.versions:
        start = time.perf_counter()
        note(version, "build", start, built(version, checkout))
    for version in arguments.versions:
        start = time.perf_counter()
        for what, wrong in used(version, list(arguments.versions), checkout).items():
            note(version, what, start, wrong)
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
