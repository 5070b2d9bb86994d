"""One schema and one fake kernel per op, in two namespaces, and the native libraries that implement them.

`fused_cnn::<op>` is native code (C++ on the CPU key, CUDA C++ on the CUDA key); `fused_cnn_triton::<op>` is Triton. The device is a
dispatch key and the backend is a namespace, so nothing here asks a tensor where it lives. Importing this module loads the
CPU library, and the CUDA one where torch has CUDA; neither touches a CUDA context.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._ops import OpOverload

NAMESPACES = {"native": "fused_cnn", "triton": "fused_cnn_triton"}
CUDA_LIBRARY = Path(__file__).with_name("_C_cuda.so")

_libraries = {backend: torch.library.Library(ns, "DEF") for backend, ns in NAMESPACES.items()}
_kernels: dict[tuple[str, str], OpOverload] = {}
_implemented: dict[tuple[str, str, str], bool] = {}  # (op, backend, device type); a table, because torch.compile traces look-ups


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Declare an op, such as `add_relu_fwd(Tensor x, Tensor residual) -> Tensor`, with its fake kernel, for every backend."""
    name = schema.partition("(")[0]
    for backend, library in _libraries.items():
        library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
        qualified = f"{NAMESPACES[backend]}::{name}"
        torch.library.register_fake(qualified, fake, lib=library)
        _kernels[name, backend] = getattr(getattr(torch.ops, NAMESPACES[backend]), name).default
    _look_up(name)


def _look_up(name: str) -> None:
    for backend, namespace in NAMESPACES.items():
        for device_type in ("cpu", "cuda"):
            found = torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", device_type.upper())
            _implemented[name, backend, device_type] = found


def define_triton(room: str, *names: str) -> None:
    """Register `fused_cnn.ops.<room>.triton.<name>` for each name; the module, and Triton, are imported at the first call."""

    def lazy(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            return getattr(importlib.import_module(f"fused_cnn.ops.{room}.triton"), name)(*args)

        return call

    for name in names:
        for key in ("CUDA", "CPU"):  # the CPU key serves Triton's interpreter
            _libraries["triton"].impl(name, lazy(name), key)
        _look_up(name)


def kernel(name: str, backend: str) -> OpOverload:
    """The callable of a declared op in a backend's namespace."""
    return _kernels[name, backend]


def has_kernel(name: str, backend: str, device_type: str) -> bool:
    """Whether the backend registered a kernel of this op for the device type ("cpu" or "cuda")."""
    return _implemented.get((name, backend, device_type), False)


def op_names() -> list[str]:
    """Every declared op."""
    return sorted({name for name, _ in _kernels})


def load_cuda() -> str:
    """Load the CUDA library, if it was built; returns why it does not load. Safe without a GPU and without a CUDA build of torch: what
    it needs of these it looks up at a kernel's first call. Every other symbol must be there now, not when a call would end the process."""
    if CUDA_LIBRARY.exists():
        try:
            ctypes.CDLL(str(CUDA_LIBRARY), mode=os.RTLD_NOW)
        except OSError as error:  # built for another torch or system
            return str(error)
        for name in op_names():
            _look_up(name)
    return ""


def _load_cpu() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fused_cnn._C"), ""
    except ImportError as error:
        return None, str(error)


cpu_module, cpu_error = _load_cpu()
cuda_error = load_cuda() if torch.backends.cuda.is_built() else ""
