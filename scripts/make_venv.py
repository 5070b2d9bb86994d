"""Makes the project's virtual environment: `python3 scripts/make_venv.py .venv`. Run again, it adds only what
is missing.

A torch that the calling Python has already is used as it is (a GPU machine's own build); otherwise torch is
installed in the version below, named exactly, because an open range can pull gigabytes of another build.
torchvision follows torch's version and comes without its dependencies, so that it never replaces torch.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

TORCH = "2.13.0"
MIN_TORCH = (2, 10)
READ_PROJECT = """
import json
try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib
print(json.dumps(tomllib.load(open("pyproject.toml", "rb"))["project"]))
"""
VERSION_OF = "import importlib.metadata as m; print(m.version({!r}))"


def version_of(python: str, package: str) -> tuple[int, int] | None:
    """(major, minor) of an installed package, or None."""
    done = subprocess.run([python, "-c", VERSION_OF.format(package)], capture_output=True, text=True)
    match = re.match(r"(\d+)\.(\d+)", done.stdout)
    return (int(match[1]), int(match[2])) if done.returncode == 0 and match else None


def requirements(python: str, *extras: str) -> list[str]:
    """What pyproject.toml says that the project and these extras need."""
    done = subprocess.run([python, "-c", READ_PROJECT], capture_output=True, text=True, check=True)
    project = json.loads(done.stdout)
    return [
        *project["dependencies"],
        *(needed for extra in extras for needed in project["optional-dependencies"][extra]),
    ]


def step(text: str) -> None:
    print(f"[venv] {text}", flush=True)


def main(folder: Path) -> None:
    python = str(folder / "bin" / "python")
    if not (folder / "bin" / "pip").exists():  # what `venv` writes last
        shared = (version_of(sys.executable, "torch") or (0, 0)) >= MIN_TORCH
        step(f"making {folder}" + (" over this Python's own torch" if shared else ""))
        options = ["--system-site-packages"] if shared else []
        subprocess.run([sys.executable, "-m", "venv", *options, str(folder)], check=True)
        # A virtual environment's packages are not the system's: they are named one by one.
        if shared and sys.prefix != sys.base_prefix:
            version = f"python{sys.version_info.major}.{sys.version_info.minor}"
            (folder / "lib" / version / "site-packages" / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def pip(*packages: str) -> None:
        # Python compiles what it imports; to compile all of torch takes longer than its download.
        subprocess.run([python, "-m", "pip", "install", "-qq", "--no-compile", *packages], check=True)

    pip("setuptools>=77", "wheel")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc and version_of(python, "nvidia-cutlass") is None:
        step("installing CUTLASS's headers")
        wheel = re.search(r"nvidia-cutlass==[\d.]+", Path("fused_cnn/_builds.py").read_text())
        pip("--no-deps", *([wheel[0]] if wheel else []))
    if version_of(python, "torch") is None:
        step(f"installing torch {TORCH} (the largest download)")
        pip(f"torch=={TORCH}")
    torch = version_of(python, "torch")
    assert torch is not None
    if version_of(python, "torchvision") is None:
        step("installing torchvision, for its architectures")
        pip("--no-deps", f"torchvision==0.{torch[1] + 15}.*")
    step(
        "building fused_cnn (MAX_JOBS limits how many compilers run at once), and installing what its tests and "
        "commands need"
    )
    with subprocess.Popen([python, "setup.py", "--quiet", "build_ext", "--inplace"]) as build:
        pip(*requirements(python, "verify", "test", "serve", "lint"))
    if build.returncode:
        raise subprocess.CalledProcessError(build.returncode, build.args)
    pip("--no-build-isolation", "--no-deps", "-e", ".")
    subprocess.run([python, "examples/torchvision_shim.py"], check=True)


if __name__ == "__main__":
    try:
        folder = Path(sys.argv[1]).absolute()
        os.chdir(Path(__file__).resolve().parents[1])
        main(folder)
    except subprocess.CalledProcessError as error:
        sys.exit(f"[venv] failed: {' '.join(map(str, error.cmd))}")
