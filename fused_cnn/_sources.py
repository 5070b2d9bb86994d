"""Hashes of the kernels' sources, by which a measurement is known to be of these kernels or of older ones; and the ops'
schemas, which the CPU's library is built with.

The build reads this file too, so it imports nothing that is not Python's own.
"""

import ast
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CSRC = PACKAGE.parent / "csrc"


def digest(paths: Iterable[Path], root: Path) -> str:
    """16 hexadecimal digits of the files' names and contents, whatever order they come in."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def _serves(path: Path, device: str) -> bool:
    """Whether a file of csrc/ is part of a device's native kernels. csrc/cpu and csrc/cuda are one device's; in the
    rooms `cpu*` is the CPU's and `.cu` and `.cuh` are CUDA's; other headers are both's."""
    top = path.relative_to(CSRC).parts[0]
    if top in ("cpu", "cuda"):
        return top == device
    if path.suffix in (".cu", ".cuh"):
        return device == "cuda"
    return device == "cpu" if path.suffix == ".cpp" or path.name.startswith("cpu") else True


def schemas() -> list[str]:
    """What the calls of `define` in fused_cnn/ops state: the ops that have kernels in C++. A call is a statement of its
    module, and its first argument a literal."""
    texts = [path.read_text() for path in files_under(PACKAGE / "ops") if path.suffix == ".py"]
    statements = [node for text in texts if "\ndefine(" in text for node in ast.parse(text).body]
    calls = [node.value for node in statements if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    defines = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "define"]
    return sorted(ast.literal_eval(call.args[0]) for call in defines)


def library_hash(device: str) -> str:
    """Of everything that a device's native library is compiled from; the CPU's has the schemas in it."""
    found = digest([path for path in files_under(CSRC) if _serves(path, device)], CSRC)
    if device == "cpu":
        found = hashlib.sha256("\n".join([found, *schemas()]).encode()).hexdigest()[:16]
    return found


def kernel_hash(room: str, backend: str, device: str) -> str | None:
    """Of the files that one room's kernels are made of.

    Args:
        room: a folder of fused_cnn/ops.
        backend: "native" or "triton".
        device: "cpu" or "cuda", whose native kernels have files of their own.

    Returns:
        The hash; None for native kernels where csrc/ is not at hand (a package without its checkout).
    """
    if backend == "triton":
        return digest([*(PACKAGE / "ops").glob("_triton*.py"), PACKAGE / "ops" / room / "triton.py"], PACKAGE)
    if not CSRC.is_dir():
        return None
    found = [path for top in ("shared", device, room) for path in files_under(CSRC / top)]
    return digest([path for path in found if _serves(path, device)], CSRC)


def with_headers(path: Path, csrc: Path = CSRC) -> set[Path]:
    """A source and those of csrc's files that it includes, by itself or by way of others."""
    found, todo = set(), [path]
    while todo:
        found.add(path := todo.pop())
        named = (csrc / name for name in re.findall(r'#include "([^"]+)"', path.read_text()))
        todo += [header for header in named if header.is_file() and header not in found]
    return found


def hashes(device: str) -> dict[str, dict[str, str | None]]:
    """Every room's, by backend, of the kernels that run on a device."""
    rooms = sorted(p.name for p in (PACKAGE / "ops").iterdir() if (p / "op.py").is_file())
    found: dict[str, dict[str, str | None]] = {"native": {room: kernel_hash(room, "native", device) for room in rooms}}
    if device == "cuda":
        found["triton"] = {
            r: kernel_hash(r, "triton", device) for r in rooms if (PACKAGE / "ops" / r / "triton.py").is_file()
        }
    return found
