"""What was measured on a device, and where it is kept.

A table holds three kinds of answer for one device. `choices`: the backend of a public op's call. `tiles`: a kernel's
tiles for one problem size. `checks`: whether a kernel gave PyTorch's results before its first use (_first_use.py). It
is JSON. The measured one lies in the cache folder (FUSED_CNN_CACHE_DIR, or
~/.cache/fused_cnn), in a file of its own for each device, driver, torch, Triton and state of the kernels' sources: what
was measured elsewhere, or before a change, is never found. Tables that ship with the package (fused_cnn/tables/) hold
for a device and the sources.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import _first_use, _library
from ._backends import BACKENDS, driver_version, usable
from ._sources import PACKAGE, digest

VERSION = 2
KINDS = ("choices", "tiles", "checks")
# The name by which the CUDA library's convolutions go in `tiles`; the key is a problem of _library.py but for its
# device.
GEMM = "gemm"
Key = tuple[Any, ...]


@dataclass
class Table:
    """What was measured on one device: entries by key, each with the winner and every candidate's seconds."""

    choices: dict[Key, dict[str, Any]] = field(default_factory=dict)
    tiles: dict[Key, dict[str, Any]] = field(default_factory=dict)
    checks: dict[Key, str] = field(default_factory=dict)

    def update(self, other: Table) -> None:
        self.choices |= other.choices
        self.tiles |= other.tiles
        self.checks |= other.checks

    def to_json(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        entries = {kind: {repr(k): v for k, v in in_order(getattr(self, kind))} for kind in KINDS}
        return {"version": VERSION, **facts, **entries}

    @classmethod
    def from_json(cls, document: Mapping[str, Any], wanted: Mapping[str, Any]) -> Table:
        """Raises ValueError where the document is no table, or one of another device or of other sources."""
        for name, value in {"version": VERSION, **wanted}.items():
            if document.get(name) != value:
                raise ValueError(f"its {name} is {document.get(name)!r}, not {value!r}")
        table = cls(*({ast.literal_eval(k): v for k, v in document[kind].items()} for kind in KINDS))
        if not all(isinstance(key, tuple) and key for key in (*table.choices, *table.tiles, *table.checks)):
            raise ValueError("it has keys that are no tuples")
        for entry in table.choices.values():
            if entry["best"] not in BACKENDS:
                raise ValueError(f"it names a backend {entry['best']!r}")
        for entry in table.tiles.values():
            if not all(isinstance(n, int) for n in entry["best"]):
                raise ValueError(f"it has tiles {entry['best']!r}")
        if not all(isinstance(what, str) for what in table.checks.values()):
            raise ValueError("it has checks that came to nothing that is known")
        return table


def in_order(entries: Mapping[Key, Any]) -> list[tuple[Key, Any]]:
    """The entries in an order that does not depend on when they were measured."""
    return sorted(entries.items(), key=lambda item: repr(item[0]))


@functools.lru_cache
def source_hash(device_type: str) -> str:
    """A hash of the sources of a device's kernels: of the Triton files as they are, of the native library as it was
    built."""
    library = _library.cuda if device_type == "cuda" else _library.cpu
    return f"{digest((PACKAGE / 'ops').rglob('*triton*.py'), PACKAGE)} {library.facts.get('sources', '')}"


def cpuinfo(field: str) -> str:
    """The first processor's, as Linux states it; empty where it does not."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(field):
                return line.partition(":")[2].strip()
    return ""


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.lru_cache
def facts(device: torch.device) -> dict[str, Any]:
    """What a measured table holds for: the GPU and the version of CUDA that its driver supports, such as 13000, or the
    processor with the kernels' instruction set."""
    gpu = device.type == "cuda"
    processor = f"{cpuinfo('model name') or 'CPU'}, {_library.cpu_level() or 'no native kernels'}"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else processor,
        "driver": driver_version() if gpu else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "sources": source_hash(device.type),
    }


def cache_dir() -> Path:
    """Where measured tables lie; made by the first one."""
    return Path(os.environ.get("FUSED_CNN_CACHE_DIR") or Path.home() / ".cache" / "fused_cnn")


def slug(device: torch.device) -> str:
    return re.sub(r"[^a-z0-9]+", "-", facts(device)["device"].lower()).strip("-")


def cache_file(device: torch.device) -> Path:
    """The measured table of this device, driver, torch, Triton and sources."""
    digest = hashlib.sha256(json.dumps(facts(device), sort_keys=True).encode()).hexdigest()[:12]
    return cache_dir() / f"{slug(device)}-{digest}.json"


def load(path: Path, wanted: Mapping[str, Any]) -> Table:
    """The table in a file; an empty one, with a warning, where the file cannot be used. A missing file is no fault, nor
    is one in a folder that this user may not enter."""
    try:
        return Table.from_json(json.loads(path.read_text()), wanted)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return Table()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(
            f"fused_cnn ignores the tuning table {path} ({reason}); `fused-cnn tune` makes it anew", stacklevel=2
        )
        return Table()


def save(path: Path, table: Table, found: Mapping[str, Any]) -> None:
    """Add the table's entries to those of the file, which is at every moment the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system drops the lock of a process that ends, however it ends
        merged = load(path, found)
        merged.update(table)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with open(handle, "w") as file:
                json.dump(merged.to_json(found), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


_lock = threading.Lock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_tables: dict[torch.device, Table] = {}  # loaded at the device's first call
_to_say: list[str] = []
_unfinished: dict[torch.device, int] = {}  # how often the moment did not allow a device's kernels to be compared
PATIENCE = 8
asks = True  # whether an op need look at the tables at all: a microsecond, where an op may take five


def table(device: torch.device) -> Table:
    """What is known of the device: the shipped tables' entries, and over them the measured ones."""
    found = _tables.get(device)
    if found is not None:
        return found
    with _lock:
        found = _tables.get(device) or _load(device)
        said = "\n".join(_to_say)
        _to_say.clear()
    if said:  # without the lock: who listens may call an op
        warnings.warn(said, stacklevel=2)
    return found


def _load(device: torch.device) -> Table:
    global asks
    found = Table()
    wanted = {name: facts(device)[name] for name in ("device", "sources")}
    for path in sorted((PACKAGE / "tables").glob(f"{slug(device)}*.json")):
        found.update(load(path, wanted))
    found.checks.clear()  # which hold for a driver, too
    with contextlib.suppress(RuntimeError):  # a user without a home folder has no cache
        found.update(load(cache_file(device), facts(device)))
    if device.type == "cuda" and usable("native", device):
        _check(device, found)
    products = {tuple(problem): entry["best"] for (kernel, *problem), entry in found.tiles.items() if kernel == GEMM}
    if products and _library.cuda.loaded is not None:
        for problem, best in products.items():
            with contextlib.suppress(ValueError):  # a tile that this build does not have
                _library.choose_tile(_library.cuda.loaded, (device.index or 0, *problem), tuple(best))
    if not _unfinished.get(device) or _unfinished[device] >= PATIENCE:
        _tables[device] = found
    kinds = {d.type for d in _tables}
    asks = (
        any(t.choices for t in _tables.values())
        or ("cuda" not in kinds and torch.backends.cuda.is_built())
        or "cpu" not in kinds
    )
    return found


def _check(device: torch.device, known: Table) -> None:
    """Compare the CUDA library's kernels, where that was not done before, and see that none which is wrong runs."""
    library = _library.cuda.loaded
    assert library is not None
    place = torch.device("cuda", device.index or 0)
    _first_use.refuse(library, place, known.checks)
    if _first_use.ALL in known.checks:
        return
    if torch.cuda.is_current_stream_capturing():
        _unfinished[device] = _unfinished.get(device, 0) + 1
        return
    kernel = functools.partial(_library.kernel, backend="native")
    found = _first_use.on_its_own(lambda: _first_use.compare(library, kernel, place, known.checks))
    new = {key: what for key, what in found.items() if key == _first_use.ALL or what != _first_use.RIGHT}
    known.checks |= new
    if new:  # or an error of the moment left nothing
        _unfinished.pop(device, None)
    else:
        _unfinished[device] = _unfinished.get(device, 0) + 1
    _first_use.refuse(library, place, new)
    with contextlib.suppress(OSError, RuntimeError):  # each process compares where nothing can be kept
        save(cache_file(device), Table(checks=known.checks), facts(device))
    gpu = facts(device)["device"]
    _to_say.extend(_first_use.sentence(key, what, gpu) for key, what in new.items() if key != _first_use.ALL)


def forget() -> None:
    """Read the tables again at the next call."""
    global asks
    with _lock:
        _tables.clear()
        _unfinished.clear()
        asks = True
