"""What the native libraries were built of and for, and whether that fits a GPU and its driver.

A library's file holds its facts as JSON (csrc/build_facts.cpp), so that they are known without loading it. The build
reads this file too: it imports nothing that is not Python's own.
"""

import json
import re
from pathlib import Path

# The wheel whose headers the matrix products are made of; its Python dependencies are not needed.
CUTLASS = "nvidia-cutlass==4.2.0.0"
Capability = tuple[int, int]  # compute capability: (9, 0) is Hopper's
MARK = re.compile(rb"fused_cnn build facts: (\{[^\0]*\})\0")


def facts_in(file: Path) -> dict[str, str]:
    """What the build wrote into a library; empty where there is no such file, or it is of another make."""
    try:
        found = MARK.search(file.read_bytes())
    except OSError:
        return {}
    return json.loads(found[1]) if found else {}


def entries(arch_list: str) -> list[str]:
    """Of TORCH_CUDA_ARCH_LIST, such as "8.0;9.0a;10.0+PTX"."""
    return [entry for entry in re.split(r"[;\s]+", arch_list) if entry]


def covers(arch_list: str, capability: Capability, ptx: bool = True) -> bool:
    """Whether code for these architectures runs on a GPU: machine code on its own major version from its minor on (with
    an `a` on that one alone), PTX, which the driver compiles, on all later ones too."""
    for entry in entries(arch_list):
        number = entry.removesuffix("+PTX")
        major, minor = (int(part.rstrip("af")) for part in number.split("."))
        if number.endswith("a"):
            fits = (major, minor) == capability
        elif ptx and entry.endswith("+PTX"):
            fits = (major, minor) <= capability
        else:
            fits = major == capability[0] and minor <= capability[1]
        if fits:
            return True
    return False


def arch_for(capability: Capability) -> str:
    """The entry of TORCH_CUDA_ARCH_LIST that a GPU's own kernels are built by: Hopper's need its architecture-specific
    instructions."""
    return "9.0a" if capability == (9, 0) else "{}.{}".format(*capability)


def mismatch(facts: dict[str, str], driver: int | None, capability: Capability) -> str:
    """Why CUDA kernels with these facts cannot run under a driver (13000 is CUDA 13.0; None: unknown) on a GPU; ""
    where they can."""
    cuda, archs = facts["cuda"], facts["cuda_archs"]
    if driver is not None and int(cuda.split(".")[0]) > driver // 1000:
        supported = f"{driver // 1000}.{driver % 1000 // 10}"
        return f"built with CUDA {cuda}, but the driver supports CUDA {supported}: update it, or set CUDA_HOME"
    major, minor = (int(part) for part in cuda.split(".")[:2])
    ptx = driver is None or driver >= 1000 * major + 10 * minor  # PTX of a later CUDA it cannot compile
    if covers(archs, capability, ptx):
        return ""
    name, remedy = ".".join(map(str, capability)), f"set TORCH_CUDA_ARCH_LIST={arch_for(capability)}"
    return f"built for compute capability {archs}, but the GPU has {name}: {remedy}"
