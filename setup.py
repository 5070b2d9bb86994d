"""Builds the two native libraries: `_C` (C++, CPU; always) and `_C_cuda` (CUDA; where nvcc is found).

Both use only PyTorch's stable ABI, and no Python: the build reads torch's headers from the environment that it installs
into and never imports torch, so an isolated `pip install -e .` and one with `--no-build-isolation` are the same build,
and a library that was built elsewhere, of the same sources, is used as it is. Reads MAX_JOBS, TORCH_CUDA_ARCH_LIST
("all" for every architecture), FORCE_CUDA (1: required, 0: skipped), CUDA_HOME and CXX.
"""

import hashlib
import json
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

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 10)
MIN_SETUPTOOLS = 77  # the first that takes pyproject.toml's licence
ALL_ARCHS = "8.0;8.9;9.0a;10.0;12.0+PTX"
DEFAULT_ARCHS = "8.0;9.0a;10.0+PTX"  # where no GPU is at hand: one of each generation, which run on all of it
GIB_PER_JOB = {"_C": 1.5, "_C_cuda": 4.5}  # the largest translation unit's peak, with room to spare

SOURCES, BUILDS = (run_path(str(ROOT / "fused_cnn" / name)) for name in ("_sources.py", "_builds.py"))

# One instruction set per compilation of every csrc/**/cpu_kernels.cpp; chosen at run time (csrc/cpu/level.h).
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
    return [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]


def find_torch() -> tuple[Path, str]:
    """The folder and version of the torch that this environment has."""
    for root in search_paths():
        torch = Path(root) / "torch"
        if (torch / "version.py").is_file() and (torch / "include").is_dir():
            version = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())[1]
            if tuple(map(int, version.split(".")[:2])) < MIN_TORCH:
                fail(f"torch {version} is too old: install torch>={'.'.join(map(str, MIN_TORCH))} and run this again")
            return torch, version
    fail(
        f"torch is not installed for {sys.executable}: `pip install torch` first, then run this again "
        "(builds in a separate environment need --no-build-isolation)"
    )


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
            return include, ".".join(
                re.search(rf"#define CUTLASS_{part} (\d+)", text)[1] for part in ("MAJOR", "MINOR", "PATCH")
            )
    return None


def gpus() -> list[tuple[int, int]]:
    """The compute capabilities of this machine's GPUs."""
    smi = shutil.which("nvidia-smi")
    asked = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    text = subprocess.run(asked, capture_output=True, text=True).stdout if smi else ""
    return sorted({(int(major), int(minor)) for major, minor in re.findall(r"(?m)^(\d+)\.(\d+)$", text)})


def compilable(nvcc: str) -> set[tuple[int, int]]:
    """The compute capabilities that a compiler knows; empty where it does not say."""
    text = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    return {(int(digits[:-1]), int(digits[-1])) for digits in re.findall(r"(?m)^compute_(\d+)$", text)}


def wanted_archs(built: Path) -> str:
    """What to compile for: what TORCH_CUDA_ARCH_LIST asks for; else what the library was built for before, where that
    runs on the GPUs at hand; else these GPUs, as far as nvcc knows them; without any, the default."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if asked:
        return ALL_ARCHS if asked == "all" else asked
    before, known = BUILDS["facts_in"](built).get("cuda_archs", ""), compilable(find_nvcc())
    # Others, such as one for a display, are left to PyTorch.
    here = [gpu for gpu in gpus() if not known or gpu in known]
    if before and all(BUILDS["covers"](before, gpu) for gpu in here):
        return before
    return ";".join(map(BUILDS["arch_for"], here)) or DEFAULT_ARCHS


def archs_for(source: Path, arch_list: str) -> str:
    """The entries that a file is compiled for: products on Hopper's own instructions have files of their own."""
    keep = {"sm90a": lambda arch: arch.startswith("9.0a"), "sm80": lambda arch: not arch.startswith("9.0a")}
    wanted = keep.get(source.stem.partition("_")[0], lambda arch: True)
    return ";".join(filter(wanted, BUILDS["entries"](arch_list)))


def gencode(arch_list: str) -> list[str]:
    flags = []
    for item in BUILDS["entries"](arch_list):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", item)
        if match is None:
            fail(f"TORCH_CUDA_ARCH_LIST has {item!r}; expected all, or entries such as 8.0, 9.0a or 12.0+PTX")
        arch = "".join(match.groups("")[:3])
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


def free_gib() -> float:
    """Memory that can be had, with what the page cache would give back, here or in this container."""
    group = Path("/sys/fs/cgroup")
    try:
        found = int(re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) / 2**20
        limit = (group / "memory.max").read_text() if (group / "memory.max").is_file() else "max"
        if limit.strip() != "max":
            used = int(re.search(r"(?m)^anon (\d+)", (group / "memory.stat").read_text())[1])
            found = min(found, (int(limit) - used) / 2**30)
        return found
    except (OSError, TypeError):
        return 0.0  # unknown: one compiler


def max_jobs(gib_per_job: float) -> int:
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    return max(1, min(len(os.sched_getaffinity(0)), int(free_gib() / gib_per_job)))


def run(command: list[str], what: str, remedy: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        sys.stderr.write(f"{' '.join(command)}\n{done.stdout}{done.stderr}\n")
        fail(f"{what} failed (its messages are above): {remedy}")
    return done.stdout + done.stderr


def host_compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        fail("no C++ compiler found: install g++ or clang++ (Debian: apt-get install g++), or set CXX")
    return compiler


def stale(target: Path, depfile: Path) -> bool:
    """True unless target is newer than every file that its compiler-written dependency list names."""
    if not (target.exists() and depfile.exists()):
        return True
    names = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    made = target.stat().st_mtime
    return any(not (ROOT / n).exists() or (ROOT / n).stat().st_mtime > made for n in names)


class Build(build_ext):
    """Compiles csrc/ without torch.utils.cpp_extension, which would need torch importable and both CUDA versions
    equal."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))  # loaded by path, so it carries no Python version

    def build_extension(self, ext: Extension) -> None:
        torch, torch_version = find_torch()
        library = ext.name.rpartition(".")[2]
        output = Path(self.get_ext_fullpath(ext.name))
        objects_dir = ROOT / "build" / library  # kept between builds, which makes later ones quick
        before = ROOT / "fused_cnn" / f"{library}.so"  # of an earlier build, or carried here from another machine
        facts, jobs, link, remedy = self.cuda_jobs(before) if library == "_C_cuda" else self.cpu_jobs()
        facts |= {"recipe": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16], "machine": platform.machine()}
        output.parent.mkdir(parents=True, exist_ok=True)
        if not any(objects_dir.glob("*.o")) and fits(BUILDS["facts_in"](before), facts):
            print(f"[fused_cnn] {before.name} was built elsewhere, of these sources: kept", flush=True)
            shutil.copy2(before, output)
            return
        compiler = host_compiler()
        version = run([compiler, "--version"], compiler, "set CXX to a working compiler").splitlines()[0]
        facts |= {"torch": torch_version, "compiler": version}
        text = json.dumps(json.dumps(facts))  # a C++ literal
        jobs.append(("csrc/build_facts.cpp", "build_facts.o", [compiler, "-fPIC", f"-DFUSED_CNN_BUILD_FACTS={text}"]))
        objects_dir.mkdir(parents=True, exist_ok=True)
        for made in objects_dir.iterdir():  # of sources that are gone: compile-check would still report their kernels
            if made.with_suffix(".o").name not in {name for _, name, _ in jobs}:
                made.unlink()
        common = ["-std=c++20", "-O3", "-Icsrc", "-MMD"]
        stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", f"{torch}/include"]
        objects = []

        def compile_one(job: tuple[str, str, list[str]]) -> None:
            source, name, command = job
            target = objects_dir / name
            objects.append(str(target))
            # Made without PyTorch, and so the same for all of them.
            plain = source.endswith("cpu_kernels.cpp") or "/gemm/" in source
            line = [*command, *common, *([] if plain else stable), "-c", source, "-o", str(target)]
            stamp = target.with_suffix(".cmd")  # a changed flag rebuilds too
            if stale(target, target.with_suffix(".d")) or not stamp.exists() or stamp.read_text() != str(line):
                print(f"[fused_cnn] {source} -> {name}", flush=True)
                log = run([*line, "-MF", str(target.with_suffix(".d"))], f"compiling {source}", remedy)
                target.with_suffix(".log").write_text(log)
                stamp.write_text(str(line))

        with ThreadPoolExecutor(max_jobs(GIB_PER_JOB[library])) as pool:
            list(pool.map(compile_one, jobs))
        partial = output.with_suffix(".partial")  # an interrupted link leaves no half-written library behind
        libraries = [f"-L{torch}/lib", "-ltorch_cpu", "-lc10"]
        run([*link, "-shared", *sorted(objects), "-o", str(partial), *libraries], "linking", remedy)
        partial.replace(output)

    def cpu_jobs(self) -> tuple[dict[str, str], list, list[str], str]:
        compiler = host_compiler()
        facts = {
            "sources": SOURCES["library_hash"]("cpu"),
            "ops": registered("*.cpp"),
            "cpu_levels": ";".join(CPU_LEVELS),
        }
        # -std=c++20 would otherwise leave fused multiply-adds out.
        base = [
            compiler,
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-unknown-pragmas",
            "-Wno-psabi",
            "-ffp-contract=fast",
            "-fno-math-errno",
        ]
        jobs = []
        for source in sorted(ROOT.glob("csrc/**/*.cpp")):
            relative = str(source.relative_to(ROOT))
            name = "_".join(source.relative_to(ROOT / "csrc").with_suffix("").parts)
            if source.name == "cpu_kernels.cpp":
                jobs += [
                    (relative, f"{name}_{level}.o", [*base, *flags, f"-DFUSED_CNN_LEVEL={level}"])
                    for level, flags in CPU_LEVELS.items()
                ]
            elif name == "schemas":
                literals = "".join(f"{json.dumps(schema)}," for schema in SOURCES["schemas"]())
                jobs.append((relative, f"{name}.o", [*base, f"-DFUSED_CNN_SCHEMAS={literals}"]))
            elif name != "build_facts":
                jobs.append((relative, f"{name}.o", base))
        return facts, jobs, [compiler], "a C++20 compiler (g++ >= 11 or clang++ >= 14) is needed"

    def cuda_jobs(self, before: Path) -> tuple[dict[str, str], list, list[str], str]:
        nvcc = find_nvcc()
        arch_list = wanted_archs(before)
        sources = {path: archs_for(path, arch_list) for path in sorted(ROOT.glob("csrc/**/*.cu"))}
        cutlass = find_cutlass()
        if cutlass is None:
            print(
                f"[fused_cnn] CUTLASS's headers were not found: on CUDA convolutions will be PyTorch's own with "
                f"their epilogue behind them; for ours `pip install --no-deps {BUILDS['CUTLASS']}` and build again",
                flush=True,
            )
            sources = {path: archs for path, archs in sources.items() if path.parent.name != "gemm"}
        base = [
            nvcc,
            "-DUSE_CUDA",
            "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
            "-Xptxas=-v",
            "--expt-relaxed-constexpr",
            "--extended-lambda",
            "-lineinfo",
            *(
                f"-DFUSED_CNN_GEMM_{name.upper()}={int(any(p.stem.startswith(name) and a for p, a in sources.items()))}"
                for name in ("sm80", "sm90a")
            ),
        ]
        # CUTLASS's assertions in device code are calls, beside which wgmma instructions run one after the other.
        products = []
        if cutlass:
            source = cutlass[0].parent
            products = ["-isystem", str(cutlass[0]), "-isystem", str(source / "tools/util/include"), "-DNDEBUG"]
            # It would ask the driver for its functions at every descriptor; csrc/cuda/gemm/driver.cu does so once.
            products.append("-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL")
        jobs = [
            (
                str(path.relative_to(ROOT)),
                "_".join(path.relative_to(ROOT / "csrc").with_suffix("").parts) + ".o",
                [*base, *(products if path.parent.name == "gemm" else []), *gencode(archs)],
            )
            for path, archs in sources.items()
            if archs
        ]
        jobs.sort(key=lambda job: "gemm" not in job[0])  # the slowest first
        facts = {
            "sources": SOURCES["library_hash"]("cuda"),
            "ops": registered("*.cu"),
            "cuda": cuda_version(nvcc),
            "cuda_archs": arch_list,
            "cutlass": cutlass[1] if cutlass else "",
        }
        remedy = (
            "check that nvcc supports every entry of TORCH_CUDA_ARCH_LIST and your host compiler, "
            "or set FORCE_CUDA=0 to install the CPU part alone"
        )
        return facts, jobs, [nvcc, *gencode(arch_list)], remedy


def fits(built: dict[str, str], facts: dict[str, str]) -> bool:
    """Whether a library is what this build would make; made by another nvcc, for more architectures, or with CUTLASS
    where there is none here, it is as good."""
    # A driver may be too old for it.
    newer = int(built.get("cuda", "0").split(".")[0]) > int(facts.get("cuda", "99").split(".")[0])
    has, wanted = (set(BUILDS["entries"](of.get("cuda_archs", ""))) for of in (built, facts))
    same = ["sources", "recipe", "machine", *(["cutlass"] if facts.get("cutlass") else [])]
    return not newer and wanted <= has and all(built.get(name) == facts[name] for name in same)


def registered(pattern: str) -> str:
    """The ops that these sources register kernels of."""
    found = (re.findall(r'm\.impl\("(\w+)"', path.read_text()) for path in ROOT.glob(f"csrc/**/{pattern}"))
    return " ".join(sorted(op for ops in found for op in ops))


def cuda_version(nvcc: str) -> str:
    text = run([nvcc, "--version"], nvcc, "set CUDA_HOME to a working CUDA toolkit, or FORCE_CUDA=0")
    return re.search(r"release ([\d.]+)", text)[1]


if int(setuptools.__version__.split(".")[0]) < MIN_SETUPTOOLS:
    fail(
        f"setuptools {setuptools.__version__} is too old to read pyproject.toml: `pip install "
        f"'setuptools>={MIN_SETUPTOOLS}'` and "
        "run this again, or build without --no-build-isolation"
    )
extensions = [Extension("fused_cnn._C", sources=[])]
if find_nvcc():
    extensions.append(Extension("fused_cnn._C_cuda", sources=[]))
setup(ext_modules=extensions, cmdclass={"build_ext": Build})
