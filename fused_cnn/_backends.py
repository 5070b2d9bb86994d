"""Which backend runs an op: "reference" (plain PyTorch), "native" (C++ or CUDA C++), "triton", or "auto" (None), the best at hand.

An explicit backend never falls back: where it cannot run, BackendUnavailable says what is missing and how to get it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _library

BACKENDS = ("reference", "native", "triton")
# Where no measurement says otherwise, "auto" leaves k x k convolutions on a GPU to the library: its kernels have years of tuning.
LIBRARY_FIRST = ("conv_bias_relu_fwd",)
REBUILD = "run `pip install -e .` in the project's folder"


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run this op here."""


@dataclass(frozen=True)
class Status:
    """Whether a backend can run on a device type, and if not why, and what turns it on."""

    backend: str
    device: str
    on: bool
    reason: str
    hint: str = ""


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, the only way for it to work on CPU tensors."""
    from .ops import _triton

    return _triton.interpreting()


def status(backend: str, device_type: str) -> Status:
    """What `fused-cnn info` shows: one backend on one device type."""
    if backend == "reference":
        return Status(backend, device_type, True, "plain PyTorch")
    if backend == "triton":
        return _triton_status(device_type)
    if device_type == "cpu":
        if _library.cpu_module is None:
            return Status(backend, "cpu", False, f"fused_cnn._C does not load: {_library.cpu_error}", REBUILD)
        level = _library.cpu_module.build_info["cpu_level"]
        return Status(backend, "cpu", True, f"C++ kernels, instruction set {level}")
    if not _library.CUDA_LIBRARY.exists():
        return Status(backend, "cuda", False, "built without nvcc", f"install the CUDA toolkit, then {REBUILD}")
    if not torch.backends.cuda.is_built():
        return Status(backend, "cuda", False, "this torch is a CPU build", "install a CUDA build of torch")
    if _library.cuda_error:
        return Status(backend, "cuda", False, f"fused_cnn/_C_cuda.so does not load: {_library.cuda_error}", REBUILD)
    if not torch.cuda.is_available():
        return Status(backend, "cuda", False, "torch sees no CUDA device", "check the driver with nvidia-smi")
    built = {} if _library.cpu_module is None else _library.cpu_module.build_info
    driver: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    mismatch = cuda_mismatch(built, driver, torch.cuda.get_device_capability())
    return Status(backend, "cuda", not mismatch, mismatch or "CUDA kernels", REBUILD if mismatch else "")


def cuda_mismatch(built: dict[str, str], driver: int, capability: tuple[int, int]) -> str:
    """Why CUDA kernels of a build (fused_cnn._C.build_info) cannot run under a driver (13000 is CUDA 13.0) on a GPU; "" where they can."""
    cuda, archs = built.get("cuda", ""), built.get("cuda_archs", "")
    if cuda and int(cuda.split(".")[0]) > driver // 1000:
        return f"built with CUDA {cuda}, but the driver supports CUDA {driver // 1000}.{driver % 1000 // 10}: update it, or set CUDA_HOME"
    if not archs or any(_covers(arch, capability) for arch in archs.replace(" ", ";").split(";")):
        return ""
    name = ".".join(map(str, capability))
    return f"built for compute capability {archs}, but the GPU has {name}: set TORCH_CUDA_ARCH_LIST={name}"


def _covers(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for an entry of TORCH_CUDA_ARCH_LIST runs on a GPU: its own major version from its minor on; PTX, all later ones."""
    number, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
    major, minor = (int(part.rstrip("af")) for part in number.split("."))
    if number[-1] in "af":
        return (major, minor) == capability
    return (major == capability[0] and minor <= capability[1]) or (ptx and (major, minor) <= capability)


def _triton_status(device_type: str) -> Status:
    if importlib.util.find_spec("triton") is None:
        return Status("triton", device_type, False, "Triton is not installed", "`pip install triton`")
    if device_type == "cuda":
        on = torch.cuda.is_available()
        return Status("triton", "cuda", on, "" if on else "torch sees no CUDA device", "check the driver with nvidia-smi")
    if triton_interprets():
        return Status("triton", "cpu", True, "Triton's interpreter (slow; for tests)")
    hint = "use native on the CPU; TRITON_INTERPRET=1 runs Triton's interpreter, for tests"
    return Status("triton", device_type, False, "Triton compiles for GPUs only", hint)


def resolve(op: str, backend: str | None, x: Tensor) -> str:
    """The backend that runs `op` (a registered name such as "add_relu_fwd") on x's device.

    Raises ValueError for an unknown backend name and BackendUnavailable where an explicit one cannot run.
    """
    device_type = x.device.type
    if backend is None or backend == "auto":
        if _library.has_kernel(op, "native", device_type):
            return "native"
        triton = device_type == "cuda" and _library.has_kernel(op, "triton", device_type) and x.dtype != torch.float64
        if triton and op not in LIBRARY_FIRST:
            return "triton"
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None (auto), got {backend!r}")
    if backend == "reference" or (backend == "native" and _library.has_kernel(op, backend, device_type)):
        return backend
    if backend == "triton" and x.dtype == torch.float64:
        raise BackendUnavailable(f"backend 'triton' cannot run {op} in float64: its kernels compute in float32; use backend=None")
    state = status(backend, device_type)
    if not state.on:
        raise BackendUnavailable(f"backend {backend!r} cannot run {op} on {device_type}: {state.reason}; {state.hint}")
    if not _library.has_kernel(op, backend, device_type):
        raise BackendUnavailable(f"backend {backend!r} has no kernel for {op} on {device_type}; use backend=None")
    return backend
