"""`make compile-check`: what every GPU kernel costs in registers, spills and shared memory, on a machine with
or without a GPU.

CUDA kernels are built by the ordinary build where nvcc is found, and ptxas's own report of that build is
read. Triton kernels, those that each room lists in SHIPPED, are compiled offline by the Triton wheel and read
with its cuobjdump. A kernel that spills to local memory fails the check; what cannot be checked here is said,
with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fused_cnn import ops

ROOT = Path(__file__).resolve().parents[1]
CUDA_ARCHS = ("sm_80", "sm_90a")
TRITON_TARGETS = (80, 90, 100)
PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass
class Kernel:
    """One compiled kernel: registers a thread, bytes a thread spilled to local memory, bytes of shared
    memory a block.
    """

    source: str
    name: str
    arch: str
    registers: int
    spilled: int
    shared: int


def demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    lines = subprocess.run([tool, "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"fused_cnn::|\(anonymous namespace\)::", "", line) for line in lines]


def cuda_kernels(skipped: list[str]) -> list[Kernel]:
    """Every CUDA kernel on CUDA_ARCHS, from the log of the ordinary build."""
    if os.environ.get("FORCE_CUDA") == "0":
        skipped.append("CUDA kernels: FORCE_CUDA=0")
        return []
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    if subprocess.run(build, cwd=ROOT).returncode != 0:
        sys.exit("compile-check: the build failed")
    logs = sorted((ROOT / "build" / "_C_cuda").glob("*.log"))
    if not (ROOT / "fused_cnn" / "_C_cuda.so").exists() or not logs:
        skipped.append("CUDA kernels: nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
        return []
    found = []
    for log in logs:
        text = log.read_text()
        for arch in CUDA_ARCHS:
            if f"for '{arch}'" not in text:
                skipped.append(f"{log.stem} on {arch}: not in TORCH_CUDA_ARCH_LIST")
        for m in PTXAS.finditer(text):
            if m["arch"] in CUDA_ARCHS:
                shared = re.search(r"(\d+) bytes smem", m["rest"])
                spilled = int(m["stores"]) + int(m["loads"])
                found.append(Kernel(log.stem, m["name"], m["arch"], int(m["registers"]), spilled, int(shared[1]) if shared else 0))
    for kernel, name in zip(found, demangled([k.name for k in found]), strict=True):
        kernel.name = name
    return found


def triton_kernels(skipped: list[str]) -> Iterator[Kernel]:
    """Every kernel that a room ships, for every target and dtype."""
    try:
        import triton
    except ImportError as error:
        skipped.append(f"Triton kernels: {error}; `pip install triton`")
        return
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(cuobjdump) if cuobjdump.exists() else shutil.which("cuobjdump")
    if tool is None:
        skipped.append("Triton kernels: this Triton carries no cuobjdump, and none is on PATH")
        return
    for room in pkgutil.iter_modules(ops.__path__):
        name = f"{ops.__name__}.{room.name}.triton"
        if not room.ispkg or importlib.util.find_spec(name) is None:
            continue
        for shipped in importlib.import_module(name).SHIPPED:
            for target in TRITON_TARGETS:
                if shipped.descriptors and target < 90:
                    continue
                for dtype in shipped.dtypes:
                    yield compiled(shipped, target, dtype, tool, room.name)


def compiled(shipped: Any, target: int, dtype: str, tool: str, room: str) -> Kernel:
    """Compile one kernel offline, as a launch on 16-byte-aligned tensors would, and read its cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = (
        dict.fromkeys(shipped.pointers, f"*{dtype}")
        | dict.fromkeys(shipped.float32, "*fp32")
        | dict.fromkeys(shipped.bytes, "*u8")
        | dict.fromkeys(shipped.scalars, "i32")
        | dict.fromkeys(shipped.floats, "fp32")
        | dict.fromkeys(shipped.constants, "constexpr")
        | {name: f"tensordesc<{dtype}{list(block)}>".replace(" ", "") for name, block in shipped.descriptors.items()}
    )
    ordered = {name: signature[name] for name in shipped.kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(ordered.items())
        if kind.startswith("*") or name in shipped.aligned
    }
    source = ASTSource(fn=shipped.kernel, signature=ordered, constexprs=dict(shipped.constants), attrs=aligned)
    options = {"num_warps": shipped.num_warps, "num_stages": shipped.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, shared, local = map(int, RESOURCES.search(text).groups())  # type: ignore[union-attr]
    name = f"{shipped.kernel.__name__} {dtype}"
    return Kernel(f"{room}/triton.py", name, f"sm_{target}", registers, stack + local, max(shared, kernel.metadata.shared))


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every GPU kernel and table what it costs.")
    parser.add_argument("--json", type=Path, help="also save the table here")
    arguments = parser.parse_args()
    skipped: list[str] = []
    kernels = [*cuda_kernels(skipped), *triton_kernels(skipped)]
    table = Table("source", "kernel", "arch", "registers", "spilled bytes", "shared bytes", box=SIMPLE)
    for k in kernels:
        table.add_row(k.source, k.name, k.arch, str(k.registers), f"[red]{k.spilled}[/]" if k.spilled else "0", str(k.shared))
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)
    for line in skipped:
        console.print(f"skipped: {line}", highlight=False, soft_wrap=True)
    spilling = [k for k in kernels if k.spilled]
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"kernels": [asdict(k) for k in kernels], "skipped": skipped}, indent=1) + "\n")
    print(f"compile-check: {len(kernels)} kernels compiled, {len(spilling)} spill, {len(skipped)} skipped")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
