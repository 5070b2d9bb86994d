"""`fused-cnn info`: which backend is on, and for one that is off why and how to turn it on; the build,
versions, devices, caches.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .. import _backends, _library, _sources, _tables
from ._common import Json, commit, emit, out

PACKAGES = ("fused_cnn", "torch", "torchvision", "timm", "triton", "numpy", "scikit-image", "matplotlib", "onnxruntime", "openvino")


def info(json: Json = False) -> None:
    """Show each backend (on, or off, why, and how to turn it on), the build, versions, devices and caches."""
    facts = collect()
    if json:
        emit(facts)
        return
    console = out()
    table = Table("backend", "device", "state", "why", "to turn it on", title="Backends")
    for row in facts["backends"]:
        state = "[green]on[/]" if row["on"] else "[yellow]off[/]"
        table.add_row(row["backend"], row["device"], state, row["reason"], row["hint"])
    console.print(table)
    for title in ("build", "versions", "devices", "cache"):
        table = Table(title=title.capitalize(), show_header=False)
        for name, value in facts[title].items():
            table.add_row(name, "\n".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value))
        console.print(table)


def collect() -> dict[str, Any]:
    """Everything that `info` shows, as JSON."""
    return {
        "backends": [asdict(_backends.status(b, d)) for d in ("cpu", "cuda") for b in _backends.BACKENDS],
        "build": build_facts(),
        "versions": versions(),
        "devices": devices(),
        "cache": cache(),
    }


def facts_of_run(device: str) -> dict[str, Any]:
    """Where and with what a measurement was taken; every saved result carries it."""
    kept = ("python", "fused_cnn", "torch", "triton", "onnxruntime", "openvino")
    return {
        "device": device,
        "device_name": devices()["cuda:0" if device == "cuda" else "cpu"],
        "arch": architecture(device),
        "driver": _tables.driver(torch.device(device)),
        "clocks": clocks(device),
        "versions": {k: v for k, v in versions().items() if k in kept},
        "commit": commit(),
        "sources": _sources.hashes(device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def architecture(device: str) -> str:
    """sm_90 and the like of a GPU; the instruction set that the kernels use on a CPU."""
    if device == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    return _library.cpu_level() or "none"


def clocks(device: str) -> str:
    """The clocks at this moment, as the driver or Linux states them; empty where neither does."""
    if device == "cuda":
        what = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        asked = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", "--id=0"]
        try:
            return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""
    return f"{cpuinfo('cpu MHz')} MHz" if cpuinfo("cpu MHz") else ""


def build_facts() -> dict[str, Any]:
    libraries = {library.file.name: library.facts or "not built" for library in (_library.cpu, _library.cuda)}
    return {**libraries, "commit": commit() or "not a git checkout"}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"torch": torch.__version__}  # which says what it was built for; its package may not


def cpuinfo(field: str) -> str:
    """The first processor's, as Linux states it; empty where it does not."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def cpu_name() -> str:
    return cpuinfo("model name") or platform.processor() or platform.machine()


def devices() -> dict[str, str]:
    found = {"cpu": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    return found


def cache() -> dict[str, str]:
    tables = {d: _tables.table(torch.device(d)) for d in ("cpu", *(["cuda:0"] if torch.cuda.is_available() else []))}
    known = ", ".join(f"{len(t.choices) + len(t.tiles)} for {d}" for d, t in tables.items())
    return {
        "on disk": f"{_tables.cache_dir()}: what `fused-cnn tune` measured; entries that hold here: {known}",
        "in memory": "folded and packed weights, one copy for each fused block that has run in eval",
    }
