"""Builds the two native libraries: `_C` (C++, CPU; always) and `_C_cuda` (CUDA; where nvcc is found).

Both use only PyTorch's stable ABI, so the build reads torch's headers from the environment that it installs into and never
imports torch: an isolated `pip install -e .` and one with `--no-build-isolation` are the same build.
Reads MAX_JOBS, TORCH_CUDA_ARCH_LIST, FORCE_CUDA (1: required, 0: skipped), CUDA_HOME and CXX.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 10)
DEFAULT_ARCHS = "8.0;8.9;9.0a;10.0;12.0+PTX"
GIB_PER_JOB = {"_C": 1.5, "_C_cuda": 4.5}  # the largest translation unit's peak, with room to spare
CUTLASS = "nvidia-cutlass==4.2.0.0"  # the wheel whose headers the matrix products are made of; its Python dependencies are not needed

# One instruction set per compilation of every csrc/*/cpu_kernels.cpp; chosen at run time (csrc/common/cpu_level.h).
CPU_LEVELS = {"generic": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
    avx512_bf16 = [*avx512, "-mavx512bf16"]
    amx = [*avx512_bf16, "-mamx-tile", "-mamx-bf16"]
    CPU_LEVELS |= {"avx2": avx2, "avx512": avx512, "avx512_bf16": avx512_bf16, "amx": amx}


def fail(message: str) -> None:
    sys.exit(f"fused_cnn: {message}")


def search_paths() -> list[str]:
    """Where this environment's packages are; pip's build isolation hides some from sys.path only."""
    return [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path, site.getusersitepackages()]


def find_torch() -> tuple[Path, str]:
    """The folder and version of the torch that this environment has."""
    for root in search_paths():
        torch = Path(root) / "torch"
        if (torch / "version.py").is_file() and (torch / "include").is_dir():
            version = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())[1]
            if tuple(map(int, version.split(".")[:2])) < MIN_TORCH:
                fail(f"torch {version} is too old: install torch>={'.'.join(map(str, MIN_TORCH))} and run this again")
            return torch, version
    fail(f"torch is not installed for {sys.executable}: `pip install torch` first, then run this again "
         "(builds in a separate environment need --no-build-isolation)")


def find_nvcc() -> str | None:
    if os.environ.get("FORCE_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    nvcc = nvcc or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None and os.environ.get("FORCE_CUDA") == "1":
        fail("FORCE_CUDA=1, but nvcc was not found: set CUDA_HOME to the CUDA toolkit, or unset FORCE_CUDA")
    return nvcc


def find_cutlass() -> tuple[Path, str] | None:
    """The headers' folder and version, where the wheel that carries them is installed."""
    for root in search_paths():
        include = Path(root) / "cutlass_library" / "source" / "include"
        header = include / "cutlass" / "version.h"
        if header.is_file():
            text = header.read_text()
            return include, ".".join(re.search(rf"#define CUTLASS_{part} (\d+)", text)[1] for part in ("MAJOR", "MINOR", "PATCH"))
    return None


def arch_entries(arch_list: str) -> list[str]:
    return re.split(r"[;\s]+", arch_list.strip())


def archs_for(source: Path, arch_list: str) -> str:
    """The entries that a file is compiled for: products on Hopper's own instructions have files of their own."""
    keep = {"sm90a": lambda arch: arch.startswith("9.0a"), "sm80": lambda arch: not arch.startswith("9.0a")}
    wanted = keep.get(source.stem.partition("_")[0], lambda arch: True)
    return ";".join(filter(wanted, arch_entries(arch_list)))


def gencode(arch_list: str) -> list[str]:
    flags = []
    for item in arch_entries(arch_list):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", item)
        if match is None:
            fail(f"TORCH_CUDA_ARCH_LIST has {item!r}; expected entries such as 8.0, 9.0a or 12.0+PTX")
        arch = "".join(match.groups("")[:3])
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


def max_jobs(gib_per_job: float) -> int:
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        free = gib_per_job
    return max(1, min(len(os.sched_getaffinity(0)), int(free / gib_per_job)))


def run(command: list[str], what: str, remedy: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        sys.stderr.write(f"{' '.join(command)}\n{done.stdout}{done.stderr}\n")
        fail(f"{what} failed (its messages are above): {remedy}")
    return done.stdout + done.stderr


def stale(target: Path, depfile: Path) -> bool:
    """True unless target is newer than every file that its compiler-written dependency list names."""
    if not (target.exists() and depfile.exists()):
        return True
    names = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    made = target.stat().st_mtime
    return any(not (ROOT / n).exists() or (ROOT / n).stat().st_mtime > made for n in names)


class Build(build_ext):
    """Compiles csrc/ without torch.utils.cpp_extension, which would need torch importable and both CUDA versions equal."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_C_cuda"):  # loaded by path, so it carries no Python version
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        torch, torch_version = find_torch()
        library = ext.name.rpartition(".")[2]
        objects_dir = ROOT / "build" / library  # kept between builds, which makes later ones quick
        objects_dir.mkdir(parents=True, exist_ok=True)
        jobs, link, remedy = self.cuda_jobs() if library == "_C_cuda" else self.cpu_jobs(torch_version)
        common = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Icsrc",
                  "-isystem", f"{torch}/include", "-isystem", sysconfig.get_path("include"), "-MMD"]
        objects = []

        def compile_one(job: tuple[str, str, list[str]]) -> None:
            source, name, command = job
            target = objects_dir / name
            objects.append(str(target))
            line = [*command, *common, "-c", source, "-o", str(target)]
            stamp = target.with_suffix(".cmd")  # a changed flag rebuilds too
            if stale(target, target.with_suffix(".d")) or not stamp.exists() or stamp.read_text() != str(line):
                print(f"[fused_cnn] {source} -> {name}", flush=True)
                log = run([*line, "-MF", str(target.with_suffix(".d"))], f"compiling {source}", remedy)
                target.with_suffix(".log").write_text(log)
                stamp.write_text(str(line))

        with ThreadPoolExecutor(max_jobs(GIB_PER_JOB[library])) as pool:
            list(pool.map(compile_one, jobs))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(".partial")  # an interrupted link leaves no half-written library behind
        libraries = [f"-L{torch}/lib", "-ltorch_cpu", "-lc10"]
        run([*link, "-shared", *sorted(objects), "-o", str(partial), *libraries], "linking", remedy)
        partial.replace(output)

    def cpu_jobs(self, torch_version: str) -> tuple[list, list[str], str]:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            fail("no C++ compiler found: install g++ or clang++ (Debian: apt-get install g++), or set CXX")
        version = run([compiler, "--version"], compiler, "set CXX to a working compiler").splitlines()[0]
        nvcc = find_nvcc()
        facts = {
            "COMPILER": version,
            "TORCH": torch_version,
            "CPU_LEVELS": ";".join(CPU_LEVELS),
            "SOURCES": run_path(str(ROOT / "fused_cnn" / "_sources.py"))["csrc_hash"](),
            "CUDA": cuda_version(nvcc) if nvcc else "",
            "CUTLASS": (find_cutlass() or ("", ""))[1] if nvcc else "",
            "CUDA_ARCHS": os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS) if nvcc else "",
        }
        base = [compiler, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi",
                "-ffp-contract=fast", "-fno-math-errno"]  # -std=c++20 would otherwise leave fused multiply-adds out
        jobs = []
        for source in sorted(ROOT.glob("csrc/**/*.cpp")):
            relative = str(source.relative_to(ROOT))
            name = "_".join(source.relative_to(ROOT / "csrc").with_suffix("").parts)
            if source.name == "cpu_kernels.cpp":
                jobs += [(relative, f"{name}_{level}.o", [*base, *flags, f"-DFUSED_CNN_LEVEL={level}"])
                         for level, flags in CPU_LEVELS.items()]
            else:
                defines = [f'-DFUSED_CNN_BUILD_{k}="{v}"' for k, v in facts.items()] if name == "module" else []
                jobs.append((relative, f"{name}.o", [*base, *defines]))
        return jobs, [compiler], "a C++20 compiler (g++ >= 11 or clang++ >= 14) is needed"

    def cuda_jobs(self) -> tuple[list, list[str], str]:
        nvcc = find_nvcc()
        arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
        sources = {path: archs_for(path, arch_list) for path in sorted(ROOT.glob("csrc/**/*.cu"))}
        cutlass = find_cutlass()
        if cutlass is None:
            print(f"[fused_cnn] CUTLASS's headers were not found: on CUDA 1x1 convolutions will be PyTorch's own with their "
                  f"epilogue behind them; for ours `pip install --no-deps {CUTLASS}` and build again", flush=True)
            sources = {path: archs for path, archs in sources.items() if path.parent.name != "gemm"}
        base = [nvcc, "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-Xptxas=-v",
                "--expt-relaxed-constexpr", "--extended-lambda", "-lineinfo",
                *(f"-DFUSED_CNN_GEMM_{name.upper()}={int(any(p.stem.startswith(name) and a for p, a in sources.items()))}"
                  for name in ("sm80", "sm90a"))]
        # CUTLASS's assertions in device code are calls, beside which wgmma instructions run one after the other.
        products = ["-isystem", str(cutlass[0]), "-DNDEBUG"] if cutlass else []
        jobs = [(str(path.relative_to(ROOT)), "_".join(path.relative_to(ROOT / "csrc").with_suffix("").parts) + ".o",
                 [*base, *(products if path.parent.name == "gemm" else []), *gencode(archs)])
                for path, archs in sources.items() if archs]
        jobs.sort(key=lambda job: "gemm" not in job[0])  # the slowest first
        return jobs, [nvcc, *gencode(arch_list)], ("check that nvcc supports every entry of TORCH_CUDA_ARCH_LIST and your host compiler, "
                                      "or set FORCE_CUDA=0 to install the CPU part alone")


def cuda_version(nvcc: str) -> str:
    text = run([nvcc, "--version"], nvcc, "set CUDA_HOME to a working CUDA toolkit, or FORCE_CUDA=0")
    return re.search(r"release ([\d.]+)", text)[1]


extensions = [Extension("fused_cnn._C", sources=[])]
if find_nvcc():
    extensions.append(Extension("fused_cnn._C_cuda", sources=[]))
setup(ext_modules=extensions, cmdclass={"build_ext": Build})
