"""The backends, the build, versions, devices and caches here, and of these what every saved result carries."""

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import _backends, _library, _sources, _tables

PACKAGES = (
    *("fused_cnn", "torch", "torchvision", "timm", "triton"),
    *("numpy", "scikit-image", "matplotlib", "onnxruntime", "openvino"),
)


def collect() -> dict[str, Any]:
    """Everything that `info` shows, as JSON."""
    libraries = {library.file.name: library.facts or "not built" for library in (_library.cpu, _library.cuda)}
    tables = {d: _tables.table(torch.device(d)) for d in ("cpu", *(["cuda:0"] if torch.cuda.is_available() else []))}
    known = ", ".join(f"{len(t.choices) + len(t.tiles)} for {d}" for d, t in tables.items())
    return {
        "backends": [asdict(_backends.status(b, d)) for d in ("cpu", "cuda") for b in _backends.BACKENDS],
        "build": {**libraries, "commit": commit() or "not a git checkout"},
        "versions": versions(),
        "devices": devices(),
        "cache": {
            "on disk": f"{_tables.cache_dir()}: what `fused-cnn tune` measured; entries that hold here: {known}",
            "in memory": "folded and packed weights, one copy for each fused block that has run in eval",
        },
    }


def facts_of_run(device: str) -> dict[str, Any]:
    """Where and with what a measurement was taken; every saved result carries it."""
    kept = ("python", "fused_cnn", "torch", "triton", "onnxruntime", "openvino")
    return {
        "device": device,
        "device_name": devices()["cuda:0" if device == "cuda" else "cpu"],
        "arch": _backends.architecture(torch.device("cuda")) if device == "cuda" else _library.cpu_level() or "none",
        "driver": _tables.facts(torch.device(device))["driver"],
        "clocks": clocks(device),
        "versions": {k: v for k, v in versions().items() if k in kept},
        "commit": commit(),
        "sources": _sources.hashes(device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def clocks(device: str) -> str:
    """The clocks at this moment, as the driver or Linux states them; empty where neither does."""
    if device == "cuda":
        what = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        return _said(["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", "--id=0"])
    mhz = _tables.cpuinfo("cpu MHz")
    return f"{mhz} MHz" if mhz else ""


def commit() -> str:
    """The commit of the source tree that this package runs from; "" where it is not a git checkout."""
    return _said(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"])


def _said(command: Sequence[str]) -> str:
    """What a command prints; "" where it cannot be run, or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str]:
    found = {package: _tables.version(package) or "not installed" for package in PACKAGES}
    # What torch says of itself names what it was built for; its package may not.
    return {"python": platform.python_version(), **found, "torch": torch.__version__}


def devices() -> dict[str, str]:
    name = _tables.cpuinfo("model name") or platform.processor() or platform.machine()
    found = {"cpu": f"{name}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    return found
