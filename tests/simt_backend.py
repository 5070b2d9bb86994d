"""The CUDA kernels on this processor: csrc/*/*.cu, unchanged, compiled by the host compiler against tests/simt, as a
backend "simt".

CUTLASS's main loops need tensor cores: plain loops stand in for them, and the epilogue behind them is the real one.

`install()` builds the library, once for its sources, and registers it; it changes nothing but the tables of
fused_cnn._library.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from fused_cnn import _backends, _library
from fused_cnn._sources import with_headers
from fused_cnn.ops.inception.op import weight_shapes
from fused_cnn.testing import all_cases, compare

ROOT = Path(__file__).resolve().parents[1]
SIMT = ROOT / "tests" / "simt"
BUILD = ROOT / "build" / "simt"
NAMESPACE = "fused_cnn_simt"
ROOMS = {  # and their ops
    "batch_norm": ("bn_relu", "bn_add_relu", "bn_relu_concat"),
    "concat": ("concat_bias_relu",),
    "conv": ("add_relu", "conv1x1_bias_relu", "conv_bias_relu"),
    "inception": ("inception",),
    "max_pool": ("max_pool2d",),
    "stem": ("stem",),
}
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-w"]
STABLE = ["-x", "c++", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA", "-DFUSED_CNN_GEMM_SM80=1"]
CALLS = "--param=asan-instrumentation-with-call-threshold=0"
CHECKED = ["-fsanitize=kernel-address,alignment", CALLS, "--param=asan-stack=0", "--param=asan-globals=0"]


_kept: list[torch.library.Library] = []


def compiler() -> str | None:
    """g++: clang spells the options of CHECKED otherwise."""
    return shutil.which("g++")


def _digest(*parts: str | Path) -> str:
    """Of texts and of files' contents."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.read_bytes() if isinstance(part, Path) else part.encode())
    return found.hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def build(csrc: Path, rooms: Sequence[str]) -> Path:
    """The library of these rooms' kernels, in build/simt, where each object is compiled once for what it is made of."""
    torch_root = Path(torch.__file__).parent
    compile_it = [compiler(), *FLAGS, f"-I{SIMT}", f"-I{csrc}", f"-isystem{torch_root / 'include'}", "-c"]
    register = f"-DFUSED_CNN_CUDA_IMPL(m)=STABLE_TORCH_LIBRARY_IMPL({NAMESPACE}, CPU, m)"
    stand_in = _digest(torch.__version__, repr((FLAGS, STABLE, CHECKED)), *_files(SIMT))
    jobs = {f"simt-{stand_in}": [SIMT / "simt.cpp"]}
    sources = sorted(path for room in rooms for path in (csrc / room).glob("*.cu"))
    used = "".join(path.read_text() for path in sources)
    if "cuda/max_pool.h" in used:
        sources.append(csrc / "cuda" / "max_pool.cu")
    if "cuda/convolve.h" in used:
        parts = ("choices", "convolve", "pointwise", "pooled_pointwise", "stem")
        sources += [csrc / "cuda" / f"{name}.cu" for name in parts]
        sources.append(SIMT / "gemm.cpp")
    for path in sources:
        made_of = _digest(stand_in, *sorted(with_headers(path, csrc)))
        jobs[f"{path.parent.name}-{path.stem}-{made_of}"] = [*STABLE, *CHECKED, register, path]
    library = BUILD / f"{_digest(*jobs)}.so"

    def make(command: list[Any], made: Path) -> None:
        partial = made.with_suffix(f".{library.stem}.partial")  # another library's build may be at it, too
        assert subprocess.call([*command, "-o", partial]) == 0, "the CUDA sources do not compile for the CPU"
        partial.rename(made)

    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            objects = {BUILD / f"{name}.o": job for name, job in jobs.items()}
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                list(pool.map(lambda made: made.exists() or make([*compile_it, *objects[made]], made), objects))
            make([compiler(), "-shared", *objects, f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"], library)
    return library


@cache
def install(csrc: Path = ROOT / "csrc", rooms: Sequence[str] = tuple(ROOMS)) -> ctypes.CDLL:
    """Register the kernels, and return their library: `simt_install(True)` makes tensors come from checked memory."""
    definitions = torch.library.Library(NAMESPACE, "DEF")
    _kept.append(definitions)
    for name in _library.op_names():
        definitions.define(str(_library.kernel(name, "native")._schema).split("::", 1)[1])
    loaded = ctypes.CDLL(os.fspath(build(csrc, rooms)))
    for name in _library.op_names():
        _library._kernels[name, "simt"] = getattr(getattr(torch.ops, NAMESPACE), name).default
        found = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")
        _library._implemented[name, "simt", "cpu"] = found
    return loaded


def captured(library: ctypes.CDLL, work: Callable[[], Tensor]) -> Tensor:
    """`work()` as a CUDA graph's capture would see it, whose accesses must be ordered by streams and events."""
    library.simt_capture.restype = ctypes.c_char_p
    library.simt_capture(True)
    try:
        return work()
    finally:
        wrong = library.simt_capture(False).decode()
        assert not wrong, wrong


def inception_of_small_tiles() -> Callable[[], Tensor]:
    """A block with whole vectors of channels and whole numbers, which no order of a sum rounds."""
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator).half()

    weights = [whole(*shape) for shape in weight_shapes(16, (8, 8, 16, 8, 8, 8), (3, 5))]
    biases = [whole(weight.size(0)) for weight in weights]
    x = whole(2, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    return lambda: _library.kernel("inception_fwd", "simt")(x, weights, biases)


def run_broken(op: str, breaks: Mapping[str, tuple[str, str, str]], folder: Path) -> dict[str, str]:
    """What is said of an op when, in a copy of csrc for each break, a piece of a file is another; see main()."""
    for name, (file, right, wrong) in breaks.items():
        shutil.copytree(ROOT / "csrc", folder / name / "csrc")
        path = folder / name / "csrc" / file
        text = path.read_text()
        assert text.count(right) == 1, f"{file} has {text.count(right)} times: {right}"
        path.write_text(text.replace(right, wrong))
    command = [sys.executable, __file__, op, *(str(folder / name) for name in breaks)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    verdicts = {name: folder / name / "verdict" for name in breaks}
    return {
        name: path.read_text() if path.exists() else f"no verdict: {done.stderr}" for name, path in verdicts.items()
    }


def main(op: str, folders: Sequence[str]) -> None:
    """In a process for each folder compare an op's kernels in its csrc with float64, and write down what came of it."""
    for folder in folders:
        child = os.fork()  # torch's import is the most of what a small room costs
        if child == 0:
            Path(folder, "verdict").write_text(verdict(Path(folder, "csrc"), op))
            os._exit(0)
        os.waitpid(child, 0)


def verdict(csrc: Path, op: str) -> str:
    """ "passed", or "caught" and what was."""
    room = next(room for room, ops in ROOMS.items() if op in ops)
    library = install(csrc, ("conv", "inception") if room == "inception" else (room,))
    library.simt_install(True)
    late = ctypes.c_int.in_dll(library, "simt_late")
    _backends.BACKENDS = (*_backends.BACKENDS, "simt")
    torch.backends.cudnn.allow_tf32 = False  # float32's bounds are those of float32
    copies, products = 0, 1  # that come as late as they may
    runs = [(torch.float32, "channels_last", copies), (torch.float16, "offset", copies)]
    if op == "conv_bias_relu":  # which has products that run on
        runs.append((torch.float16, "offset", products))
    for cases in all_cases():
        for case in cases.cases if cases.name == op else ():
            for dtype, layout, late.value in runs:
                try:
                    passes = (True, False) if op == "max_pool2d" else (True,)  # with and without places
                    found = [c for p in passes for c in compare(cases, case, "simt", dtype, layout, backward=p)]
                    wrong = [str(comparison) for comparison in found if not comparison.ok]
                except NotImplementedError:  # of an op that is not in these rooms
                    raise
                except (AssertionError, RuntimeError) as error:
                    wrong = [str(error)]
                if wrong:
                    return f"caught {cases.name} {case.name} {wrong[0]}"
    if op == "inception":
        try:
            captured(library, inception_of_small_tiles())
        except (AssertionError, RuntimeError) as error:
            return f"caught in a capture: {error}"
    return "passed"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
