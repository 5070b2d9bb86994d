"""`make compile-check` and its halves, `make cuda-check` and `make triton-check`: what every GPU kernel costs in
registers, spills, stack and shared memory, and the instructions that matter, on a machine with or without a GPU.

CUDA kernels are built by the ordinary build where nvcc is found; ptxas's report of that build and the disassembly of
its objects are read. Triton kernels, as the rooms launch them on LAYERS, are compiled offline by the Triton wheel that
is first on PYTHONPATH and read with its cuobjdump. The check fails where the compiler warned, where an op that a CUDA
source registers is not registered, and for a kernel that spills to local memory, whose block wants more shared memory
than the chip has, that multiplies matrices on sm_90 without wgmma, or that only streams activations and does not load
and store them 16 bytes at a time. What cannot be checked here is said, with the reason.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fused_cnn import _candidates, _library
from fused_cnn._candidates import measuring
from fused_cnn._trees import leaves_of
from fused_cnn.ops._cases import Maker
from fused_cnn.testing import all_cases

ROOT = Path(__file__).resolve().parents[1]
# What is compiled where nothing is asked for: bfloat16 has the largest tiles, float32 products of its own, and float16
# is as bfloat16.
TRITON_TARGETS = {80: ("bf16",), 90: ("fp32", "bf16"), 100: ("bf16",)}
# Cases of the ops that between them launch every Triton kernel with everything in its epilogue, and what is changed.
LAYERS: dict[str, dict[str, dict[str, Any]]] = {
    "add_relu": {"resnet50 layer1": {}},
    "bn_relu": {"resnet50 layer1 conv2 training": {}},
    "bn_add_relu": {"resnet50 layer1 training": {}, "resnet50 layer1 downsample training": {}},
    "concat_bias_relu": {"googlenet 3a": {}},
    "conv_bias_relu": {"resnet18 layer1 conv2": {}},
    "conv1x1_bias_relu": {"resnet50 layer1 conv3": {}, "resnet50 layer3 conv3": {"stride": 2}},
    "inception": {"googlenet 3a": {}},
    "max_pool2d": {"resnet50 maxpool": {}},
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
# Shared memory that one block may have (CUDA C++ Programming Guide, technical specifications per compute capability).
KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_90a": 227, "sm_100": 227, "sm_120": 99}
SHARED_LIMIT = {arch: kib << 10 for arch, kib in KIB.items()}
MATRIX_UNITS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}  # as PTX writes them
WIDE_LOAD = re.compile(r"ld\.global[\w.:]*\.v4\.b32")
# What the disassembly of a CUDA kernel must show, by the table's names.
INSTRUCTIONS = {
    "wgmma": re.compile(r"\bHGMMA\."),
    "mma": re.compile(r"\bHMMA\."),
    "load 16": re.compile(r"\bLDG\.E\S*\.128\b"),
    "copy 16": re.compile(r"\bLDGSTS\.E\S*\.128\b"),  # into shared memory
    "store 16": re.compile(r"\bSTG\.E\S*\.128\b"),
    "TMA store": re.compile(r"\bUTMASTG\b"),
}
WARNED = re.compile("warning|Performance Loss|is injected")  # the last of a wait between products
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass
class Kernel:
    """One compiled kernel: registers a thread, bytes a thread spilled to local memory, bytes of shared memory a
    block, and the matrix units that its products run on ("fma" where these must be exact, "none" by mistake).
    """

    source: str
    name: str
    arch: str
    registers: int
    spilled: int
    shared: int
    stack: int = 0
    matrix: str = ""
    missing: tuple[str, ...] = ()  # of INSTRUCTIONS

    @property
    def faults(self) -> list[str]:
        found = [f"{self.spilled} bytes spilled"] if self.spilled else []
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, {self.arch} has {SHARED_LIMIT[self.arch]}")
        if self.matrix and self.arch == "sm_90" and self.matrix not in ("wgmma", "fma"):
            found.append(f"products by {self.matrix}, not wgmma")
        return found + [f"no {instruction}" for instruction in self.missing]


@dataclass
class Launch:
    """A Triton kernel as a room's launcher calls it, with what Triton needs to compile it."""

    room: str
    module: str
    kernel: str
    dtype: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: dict[tuple[int, ...], Any]  # by the argument's place, what is a multiple of 16
    num_warps: int
    num_stages: int

    @property
    def label(self) -> str:
        """The kernel, its dtype and what sets this configuration apart."""
        tile = "x".join(
            str(self.constants[name]) for name in ("BM", "BN", "BC", "BK", "BLOCK") if name in self.constants
        )
        switches = [name.lower() for name, value in self.constants.items() if value is True]
        switches += [str(self.constants["PRECISION"])] if self.dtype == "fp32" and "PRECISION" in self.constants else []
        return " ".join([self.kernel, self.dtype, tile, *switches])


def demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    lines = subprocess.run(
        [tool, "-p"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [re.sub(r"fused_cnn::|\(anonymous namespace\)::", "", line) for line in lines]


def cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one that Triton's wheel carries."""
    spec = importlib.util.find_spec("triton")
    carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec and spec.origin else None
    return str(carried) if carried and carried.exists() else shutil.which("cuobjdump")


def readable(name: str) -> str:
    """A kernel's name without its parameters; of CUTLASS's kernels what tells them apart."""
    for kind, universal in (("product", "GemmUniversal"), ("convolution", "ConvUniversal")):
        if universal in name:  # the longest of these names c++filt leaves as they are
            tile = re.search(r"tuple<cute::C<(\d\d+)>, cute::C<(\d\d+)>, cute::C<\d+> ?>", name)
            return f"{kind} in tiles of {tile[1]} x {tile[2]}" if tile else kind
    return re.sub(r"^void |(?<=>)\(.*", "", name)


def wanted(name: str, arch: str) -> tuple[str, ...]:
    """The instructions that a kernel is nothing without."""
    if name.startswith(("product", "convolution")):
        return ("wgmma", "TMA store") if arch == "sm_90a" else ("mma", "store 16")
    if name.startswith("split_kernel"):
        return ("wgmma", "copy 16", "store 16")
    if name.startswith(("pooled_pointwise_kernel", "stem_kernel")):
        return ("mma", "copy 16", "store 16")
    if "true" not in name:  # the path for what does not lie on 16 bytes
        return ()
    sums_only = name.startswith("bn_moments") or (name.startswith("bn_reduce") and "(Residual)1" not in name)
    return ("load 16",) if sums_only else ("load 16", "store 16")


def disassembled(tool: str, file: Path) -> dict[tuple[str, str], str]:
    """The machine code of every kernel in an object file, by architecture and mangled name."""
    path = os.pathsep.join((str(Path(tool).parent), os.environ.get("PATH", "")))  # it calls nvdisasm
    text = subprocess.run(
        [tool, "-sass", file], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    ).stdout
    found, arch = {}, ""
    for part in re.split(r"(?m)^(?=\s*Function : |arch = )", text):
        head, _, body = part.partition("\n")
        if head.startswith("arch = "):
            arch = head.removeprefix("arch = ").strip()
        elif "Function : " in head:
            found[arch, head.split(" : ")[1].strip()] = body
    return found


def cuda_kernels(skipped: list[str], broken: list[str]) -> list[Kernel]:
    """Every CUDA kernel of the ordinary build; `broken` receives what is wrong with no kernel in particular."""
    if os.environ.get("FORCE_CUDA") == "0":
        skipped.append("CUDA kernels: FORCE_CUDA=0")
        return []
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    if subprocess.run(build, cwd=ROOT).returncode != 0:
        sys.exit("compile-check: the build failed")
    objects = sorted(p for p in (ROOT / "build" / "_C_cuda").glob("*.o") if p.with_suffix(".log").exists())
    if not (ROOT / "fused_cnn" / "_C_cuda.so").exists() or not objects:
        skipped.append("CUDA kernels: nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
        return []
    tool = cuobjdump()
    if tool is None:
        skipped.append("CUDA kernels' instructions: no cuobjdump on PATH and no Triton that carries one")
    found = []
    logs = [file.with_suffix(".log").read_text() for file in objects]

    def code_in(file: Path, log: str) -> dict[tuple[str, str], str]:
        return disassembled(tool, file) if tool and PTXAS.search(log) else {}  # what the host compiler made has none

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        codes = list(pool.map(code_in, objects, logs))
    for file, text, code in zip(objects, logs, codes, strict=True):
        broken += [f"{file.stem}: {line}" for line in text.splitlines() if WARNED.search(line)]
        matches = list(PTXAS.finditer(text))
        for m, demangled_name in zip(matches, demangled([m["name"] for m in matches]), strict=True):
            shared = re.search(r"(\d+) bytes smem", m["rest"])
            kernel = Kernel(
                source=file.stem, name=readable(demangled_name), arch=m["arch"], registers=int(m["registers"]),
                spilled=int(m["stores"]) + int(m["loads"]), shared=int(shared[1]) if shared else 0,
                stack=int(m["stack"]),
            )  # fmt: skip
            if tool:
                body = code[m["arch"], m["name"]]
                has = [name for name, pattern in INSTRUCTIONS.items() if pattern.search(body)]
                kernel.matrix = next((name for name in ("wgmma", "mma") if name in has), "")
                kernel.missing = tuple(name for name in wanted(kernel.name, kernel.arch) if name not in has)
            found.append(kernel)
    _library.cuda.load()
    if _library.cuda.error:
        broken.append(f"_C_cuda.so does not load: {_library.cuda.error}")
    sources = "\n".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cu"))
    for op in re.findall(r'm\.impl\("(\w+)"', sources):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_cnn::{op}", "CUDA"):
            broken.append(f"{op} has no CUDA registration")
    return found


def triton_kernels(skipped: list[str], targets: dict[int, tuple[str, ...]]) -> list[Kernel]:
    """Every kernel that the rooms launch, a process a core, for these architectures in these dtypes."""
    if importlib.util.find_spec("triton") is None:
        skipped.append("Triton kernels: Triton is not installed; `pip install triton`")
        return []
    tool = cuobjdump()
    if tool is None:
        skipped.append("Triton kernels: this Triton carries no cuobjdump, and none is on PATH")
        return []
    jobs = []
    for launch in recorded_launches({dtype for dtypes in targets.values() for dtype in dtypes}):
        descriptors = any(kind.startswith("tensordesc") for kind in launch.signature.values())
        for target, dtypes in targets.items():
            if launch.dtype in dtypes and (target >= 90 or not descriptors):
                jobs.append((launch, target, tool))
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        return list(pool.map(compiled, *zip(*jobs, strict=True), chunksize=8))


def recorded_launches(dtypes: set[str]) -> list[Launch]:
    """What LAYERS launch, forward and backward, in every tile that may be picked, with descriptors (Hopper's) and
    without. Triton binds the arguments and asks before it compiles: that is written down, and nothing is launched."""
    import triton
    from triton.backends.compiler import GPUTarget

    from fused_cnn.ops import _triton_conv

    found: dict[str, Launch] = {}

    def record(fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        room = fn.module.split(".")[2]
        parameters = fn.jit_function.params
        # Triton makes a constant of an integer that is 1: one launch stands for those with other strides.
        signature = {p.name: compile["signature"][p.name] for p in parameters}
        signature |= {p.name: "i32" for p in parameters if signature[p.name] == "constexpr" and not p.is_constexpr}
        constants = {p.name: compile["constants"][p.num,] for p in parameters if p.is_constexpr}
        launch = Launch(
            op_cases.room if room.startswith("_") else room, fn.module, fn.name, dtype, signature, constants,
            compile["configs"][0], compile["num_warps"], compile["num_stages"],
        )  # fmt: skip
        found.setdefault(str(launch), launch)
        return True  # it is not to be compiled

    def launch_all(tiles: dict[Any, Callable[[], object]], device: torch.device) -> dict[Any, float]:
        for launch in tiles.values():
            launch()
        return dict.fromkeys(tiles, 0.0)

    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    triton.knobs.runtime.jit_cache_hook = record
    measuring.table, measuring.seconds = SimpleNamespace(tiles={}), launch_all
    without_descriptors = patch.object(_triton_conv, "described", return_value=None)
    calls = []
    for op_cases in all_cases():
        cases = {case.name: case for case in op_cases.cases}
        for name, changed in LAYERS.get(op_cases.name, {}).items():
            calls.append((op_cases, replace(cases[name], options={**cases[name].options, **changed})))
    with patch.object(_candidates, "usable", return_value=True):
        for (op_cases, case), dtype, precision in product(calls, sorted(dtypes), ("tf32", "ieee")):
            torch.backends.cudnn.conv.fp32_precision = precision
            args, kwargs = op_cases.make(case, Maker(DTYPES[dtype]))
            for described in (nullcontext(), without_descriptors):
                measuring.table.tiles.clear()
                with described:
                    out = op_cases.op(*args, **kwargs, backend="triton")
                    torch.autograd.grad(out, leaves_of((args, kwargs)), torch.ones_like(out), allow_unused=True)
    for module in sorted(name for name in sys.modules if name.startswith("fused_cnn.ops.") and "triton" in name):
        kernels = {name for name in vars(sys.modules[module]) if name.endswith("_kernel")}
        if missed := kernels - {launch.kernel for launch in found.values()}:
            sys.exit(f"compile-check: LAYERS launch every Triton kernel but {', '.join(sorted(missed))} of {module}")
    return list(found.values())


def compiled(launch: Launch, target: int, tool: str) -> Kernel:
    """Compile a launch's kernel offline and read its cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(launch.module), launch.kernel)
    source = ASTSource(fn=function, signature=launch.signature, constexprs=launch.constants, attrs=launch.aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, shared, local = map(int, RESOURCES.search(text).groups())  # type: ignore[union-attr]
    units = [unit for unit, instruction in MATRIX_UNITS.items() if instruction in kernel.asm["ptx"]]
    matrix = (units or ["none"])[0] if "tt.dot" in kernel.asm["ttir"] else ""
    if matrix == "none" and launch.constants.get("PRECISION") == "ieee":
        matrix = "fma"  # as asked for: no matrix unit multiplies float32 exactly
    # What merges partial results takes a channel a thread.
    streams = not matrix and not launch.kernel.startswith("finish")
    return Kernel(
        f"{launch.room}/triton.py",
        launch.label,
        f"sm_{target}",
        registers,
        stack + local,
        max(shared, kernel.metadata.shared),
        stack,
        matrix,
        ("load 16",) if streams and WIDE_LOAD.search(kernel.asm["ptx"]) is None else (),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every GPU kernel and table what it costs.")
    parser.add_argument("--json", type=Path, help="also save the table here")
    parser.add_argument("--only", choices=("cuda", "triton"), help="leave the other's kernels out")
    parser.add_argument("--target", type=int, choices=TRITON_TARGETS, help="Triton kernels for this architecture alone")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="Triton kernels in these dtypes alone")
    arguments = parser.parse_args()
    wanted = {arguments.target: TRITON_TARGETS[arguments.target]} if arguments.target else TRITON_TARGETS
    targets = {target: tuple(arguments.dtype or dtypes) for target, dtypes in wanted.items()}
    skipped: list[str] = []
    broken: list[str] = []
    kernels = [] if arguments.only == "triton" else cuda_kernels(skipped, broken)
    kernels += [] if arguments.only == "cuda" else triton_kernels(skipped, targets)
    table = Table("source", "kernel", "arch", "registers", "spilled", "stack", "shared", "matrix units", box=SIMPLE)
    for k in kernels:
        row = (k.source, k.name, k.arch, str(k.registers), str(k.spilled), str(k.stack), str(k.shared), k.matrix)
        table.add_row(*row, style="red" if k.faults else None)
    console = Console()
    console.width = max(console.width, 170)
    console.print(table)
    for line in skipped:
        console.print(f"skipped: {line}", highlight=False, soft_wrap=True)
    failed = [k for k in kernels if k.faults]
    for k in failed:
        console.print(
            f"fails: {k.source}, {k.name} on {k.arch}: {'; '.join(k.faults)}", highlight=False, soft_wrap=True
        )
    for line in broken:
        console.print(f"fails: {line}", highlight=False, soft_wrap=True)
    triton = version("triton") if importlib.util.find_spec("triton") else None
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        nvcc = _library.cuda.facts.get("cuda", "")
        rows = [asdict(k) | {"faults": k.faults} for k in kernels]
        document = {"triton": triton, "nvcc": nvcc, "kernels": rows, "broken": broken, "skipped": skipped}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    print(
        f"compile-check: {len(kernels)} kernels compiled (Triton {triton}), {len(failed) + len(broken)} fail, "
        f"{len(skipped)} skipped"
    )
    return 1 if failed or broken else 0


if __name__ == "__main__":
    sys.exit(main())
