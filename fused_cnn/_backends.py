"""Which backends there are, "reference" (plain PyTorch), "native" (C++ or CUDA C++) and "triton", and whether each can
run on a device: its build, the GPU, the driver, Triton; where it cannot, what is missing and how to get it.
"""

import ctypes
import importlib
import importlib.util
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import _library, _sources
from ._builds import CUTLASS, mismatch

BACKENDS = ("reference", "native", "triton")
REBUILD = "run `pip install -e .` in the project's folder"
CUTLASS_MISSING = "convolutions are PyTorch's own, for it was built without CUTLASS"
GET_CUTLASS = f"`pip install --no-deps {CUTLASS}` and build again"


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run this op here."""


@dataclass(frozen=True)
class Status:
    """Whether a backend can run on a device, why or why not, and what turns it on or makes it better."""

    backend: str
    device: str
    on: bool
    reason: str
    hint: str = ""


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, the only way for it to work on CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def driver_version() -> int | None:
    """CUDA's version that the driver supports, such as 13000; None where there is no driver."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return version.value


def status(backend: str, device: torch.device | str) -> Status:
    """One backend on one device ("cpu", "cuda" for the current one, "cuda:1"), as `fused-cnn info` shows it."""
    device = torch.device(device)
    if backend == "reference":
        return Status(backend, device.type, True, "plain PyTorch")
    if backend == "triton":
        return Status(backend, device.type, *_triton_status(device.type))
    return Status(backend, device.type, *(_cpu_status() if device.type == "cpu" else _cuda_status(device)))


def _cpu_status() -> tuple[bool, str, str]:
    if _library.cpu.loaded is None:
        return False, f"the CPU library does not load: {_library.cpu.error}", REBUILD
    return True, f"C++ kernels, instruction set {_library.cpu_level()}{_age(_library.cpu)}", ""


def _cuda_status(device: torch.device) -> tuple[bool, str, str]:
    if device.type != "cuda":
        return False, f"there are no kernels for {device.type}", "use a CPU or an NVIDIA GPU"
    library = _library.cuda
    if not library.file.exists():
        return False, "built without nvcc", f"install the CUDA toolkit, then {REBUILD}"
    if not torch.backends.cuda.is_built():
        return False, "this torch is a CPU build", "install a CUDA build of torch"
    if library.loaded is None:
        return False, f"the CUDA library does not load: {library.error}", REBUILD
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device", "check the driver with nvidia-smi"
    unfit = mismatch(library.facts, driver_version(), torch.cuda.get_device_capability(device))
    if unfit:
        return False, unfit, REBUILD
    if not library.facts["cutlass"]:
        return True, f"CUDA kernels{_age(library)}; {CUTLASS_MISSING}", GET_CUTLASS
    return True, f"CUDA kernels{_age(library)}", ""


def _age(library: _library.NativeLibrary) -> str:
    old = _sources.CSRC.is_dir() and library.facts["sources"] != _sources.library_hash(library.device_type)
    return f", built of other sources than csrc/ holds now: {REBUILD}" if old else ""


def _triton_status(device_type: str) -> tuple[bool, str, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed", "`pip install triton`"
    try:
        importlib.import_module("triton.tools.tensor_descriptor")  # the newest part of Triton that the kernels need
    except Exception as error:  # a Triton for another Python or system, or one too old for the kernels
        return False, f"Triton does not import: {type(error).__name__}: {error}", "`pip install --upgrade triton`"
    if device_type == "cuda":
        if not torch.cuda.is_available():
            return False, "torch sees no CUDA device", "check the driver with nvidia-smi"
        missing = _missing_for_triton()
        if missing:
            return False, missing, "`apt-get install gcc python3-dev`, or the like"
        return True, "Triton kernels", ""
    if device_type == "cpu" and triton_interprets():
        return True, "Triton's interpreter (slow; for tests)", ""
    hint = "use native on the CPU; TRITON_INTERPRET=1 runs Triton's interpreter, for tests"
    return False, "Triton compiles for GPUs only", hint


def _missing_for_triton() -> str:
    """What Triton's launcher, which is compiled at the first launch, does not find here."""
    import triton

    if not triton.knobs.build.cc and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "Triton compiles its launcher with a C compiler, and there is none"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Triton compiles its launcher against Python.h, and there is none"
    return ""


_found: dict[Any, Any] = {}  # what usable and architecture have found out, once a process


def usable(backend: str, device: torch.device) -> bool:
    """Whether a backend can run on a device."""
    key = (backend, device)
    if key not in _found:
        _found[key] = status(backend, device).on
    return _found[key]


def architecture(device: torch.device) -> str:
    """ "sm_90" and the like of a GPU."""
    if device not in _found:
        _found[device] = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return _found[device]


# What torch.compiler.assume_constant_result sets, which would import the compiler: torch.compile's trace calls them
# instead of going through them.
usable._dynamo_marked_constant = architecture._dynamo_marked_constant = True  # type: ignore[attr-defined]


def outlook(backend: str | None, device: torch.device, advice: str = "") -> str:
    """In a line: which backend will run on a device, and what is missing for a better one; `advice` where kernels of
    ours run."""
    by_itself = ["native", *(["triton"] if device.type == "cuda" else []), "reference"]
    states = [status(name, device) for name in (by_itself if backend in (None, "auto") else [backend])]
    found = next((i for i, state in enumerate(states) if state.on), None)
    missing = "".join(f"; {s.backend} is off: {s.reason}; {s.hint}" for s in states[:found])
    if found is None:
        return f"nothing will run on {device}{missing}"
    best = states[found]
    hints = "".join(f"; {hint}" for hint in (best.hint, advice if best.backend != "reference" else "") if hint)
    return f"{best.backend} on {device}: {best.reason}{hints}{missing}"
