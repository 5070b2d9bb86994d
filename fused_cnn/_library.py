"""One schema and one fake kernel per op, in two namespaces, and the native libraries that implement them.

`fused_cnn::<op>` is native code (C++ on the CPU key, CUDA C++ on the CUDA key); `fused_cnn_triton::<op>` is Triton. The
device is a dispatch key and the backend is a namespace, so nothing here asks a tensor where it lives. Importing this
module loads the CPU library, and the CUDA one where torch has CUDA; neither touches a CUDA context.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ._builds import facts_in

if TYPE_CHECKING:
    from torch._ops import OpOverload

NAMESPACES = {"native": "fused_cnn", "triton": "fused_cnn_triton"}

_libraries = {backend: torch.library.Library(ns, "DEF") for backend, ns in NAMESPACES.items()}
_kernels: dict[tuple[str, str], OpOverload] = {}
# By op, backend and device type; a table, because torch.compile traces look-ups.
_implemented: dict[tuple[str, str, str], bool] = {}


class NativeLibrary:
    """The native kernels for one device type: their file, what its build wrote into it, and why it does not load, where
    it does not.

    It needs no Python and of PyTorch the stable ABI alone, so one file serves every Python and every PyTorch from 2.10
    on.
    """

    def __init__(self, file: Path, device_type: str) -> None:
        self.file, self.device_type = file, device_type
        self.facts = facts_in(self.file)
        self.loaded: ctypes.CDLL | None = None
        self.error = ""

    def load(self) -> None:
        """Load the library, which registers its kernels. Safe without a GPU and without a CUDA build of torch: what it
        needs of these it looks up at a kernel's first call. Every other symbol must be there now, not when a call would
        end the process."""
        if not self.file.exists():
            self.error = f"{self.file.name} is not there"
            return
        if not self.facts:
            self.error = f"{self.file.name} is of another version of fused_cnn"
            return
        try:
            self.loaded = ctypes.CDLL(str(self.file), mode=os.RTLD_NOW)
        except OSError as error:  # built for another system
            self.error = str(error)
            return
        for op in self.facts["ops"].split():
            _implemented[op, "native", self.device_type] = True


cpu = NativeLibrary(Path(__file__).with_name("_C.so"), "cpu")
cuda = NativeLibrary(Path(__file__).with_name("_C_cuda.so"), "cuda")


def _declare(backend: str, schema: str, fake: Callable[..., Any]) -> None:
    library, name = _libraries[backend], schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    torch.library.register_fake(f"{NAMESPACES[backend]}::{name}", fake, lib=library)


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Declare an op, such as `add_relu_fwd(Tensor x, Tensor residual) -> Tensor`, with its fake kernel, for every
    backend."""
    name = schema.partition("(")[0]
    for backend in _libraries:
        _declare(backend, schema, fake)
        _kernels[name, backend] = getattr(getattr(torch.ops, NAMESPACES[backend]), name).default


# Without it the ops of define_in_python always run in their differentiable form: right, and slower.
_below_autograd: Callable[[], AbstractContextManager[None]] | None = getattr(
    torch._C, "_AutoDispatchBelowAutograd", None
)


def define_in_python(
    schema: str,
    fake: Callable[..., Any],
    function: Callable[..., Any],
    differentiable: Callable[..., Any],
    wants_derivative: Callable[..., bool],
) -> None:
    """Declare an op that Python puts together, for every device: a graph's node, no backend's kernel. Where
    `wants_derivative` of its arguments holds, and under vmap, `differentiable` runs in its place: it is of PyTorch's
    own operators, which have every rule that is asked for."""
    name = schema.partition("(")[0]
    _declare("native", schema, fake)
    op = getattr(getattr(torch.ops, NAMESPACES["native"]), name).default

    def call(*args: Any) -> Any:
        if _below_autograd is None or wants_derivative(*args):
            return differentiable(*args)
        with _below_autograd():
            return op(*args)

    _libraries["native"].impl(name, function, "CompositeExplicitAutograd")
    _libraries["native"].impl(name, call, "Autograd")
    _libraries["native"].impl(name, differentiable, "FuncTorchBatched")


def define_triton(room: str, *names: str) -> None:
    """Register `fused_cnn.ops.<room>.triton.<name>` for each name; the module, and Triton, are imported at the first
    call."""

    def lazy(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            return getattr(importlib.import_module(f"fused_cnn.ops.{room}.triton"), name)(*args)

        return call

    for name in names:
        for device_type in ("cuda", "cpu"):  # the CPU key serves Triton's interpreter
            _libraries["triton"].impl(name, lazy(name), device_type.upper())
            _implemented[name, "triton", device_type] = True


def kernel(name: str, backend: str) -> OpOverload:
    """The callable of a declared op in a backend's namespace."""
    return _kernels[name, backend]


def has_kernel(name: str, backend: str, device_type: str) -> bool:
    """Whether the backend registered a kernel of this op for the device type ("cpu" or "cuda")."""
    return _implemented.get((name, backend, device_type), False)


def op_names() -> list[str]:
    """Every declared op."""
    return sorted({name for name, _ in _kernels})


def cpu_level() -> str:
    """The instruction set that the CPU kernels use: generic, avx2, avx512, avx512_bf16 or amx; "" where they are not
    loaded."""
    if cpu.loaded is None:
        return ""
    cpu.loaded.fused_cnn_cpu_level.restype = ctypes.c_char_p
    found: bytes = cpu.loaded.fused_cnn_cpu_level()
    return found.decode()


def set_cpu_level(name: str) -> bool:
    """Use a lower instruction set from now on, for tests and counts; False where this processor lacks it. Packed
    weights do not carry over."""
    if cpu.loaded is None:
        return False
    cpu.loaded.fused_cnn_set_cpu_level.restype = ctypes.c_bool
    return bool(cpu.loaded.fused_cnn_set_cpu_level(name.encode()))


def conv_work(
    x_shape: Sequence[int], out_channels: int, *geometry: Sequence[int], bfloat16: bool, in_place: bool
) -> tuple[int, int]:
    """What the native CPU convolution does in the form in which it runs (Winograd's or direct): the bytes that it reads
    of its packed weight, which may hold both forms, and the floating-point operations of its products. `geometry` is
    kernel, stride, padding and dilation, (h, w) each; `in_place`: the result is added to what lies where it goes."""
    assert cpu.loaded is not None
    pairs = [(ctypes.c_int64 * 2)(*pair) for pair in geometry]
    flags = (ctypes.c_bool(bfloat16), ctypes.c_bool(in_place))
    found = (ctypes.c_int64 * 2)()
    cpu.loaded.fused_cnn_conv_work((ctypes.c_int64 * 4)(*x_shape), ctypes.c_int64(out_channels), *pairs, *flags, found)
    return found[0], found[1]


# What a convolution on a GPU's tensor cores is asked for: the device, the dtype, and so on (Problem in
# csrc/cuda/gemm/tiles.h).
Problem = tuple[int, ...]
Tile = tuple[int, int, int, int]  # kind (TileKind there), m, n, k
LIBRARY_TILES = (3, 4)  # the kinds that are cuDNN's
BLOCK = 3  # the last value of a problem that is a whole block's
RECORDED = 256  # more problems than a network of today has


def _values(library: ctypes.CDLL, problem: Problem) -> Any:
    if len(problem) != library.fused_cnn_problem_values():
        raise ValueError(f"a problem has {library.fused_cnn_problem_values()} values, got {problem}")
    return (ctypes.c_int64 * len(problem))(*problem)


def _major(problem: Problem) -> int:
    return torch.cuda.get_device_capability(problem[0])[0] if torch.cuda.is_available() else 8


def tiles_of(library: ctypes.CDLL, problem: Problem) -> list[Tile]:
    """The tiles of the CUDA library that may run a problem, in the order in which a rule picks one."""
    found = (ctypes.c_int * 4 * 64)()
    count = library.fused_cnn_tiles(_values(library, problem), _major(problem), found, len(found))
    return [(kind, m, n, k) for kind, m, n, k in found[:count]]


def choose_tile(library: ctypes.CDLL, problem: Problem, tile: Tile | None) -> None:
    """Run this problem with that tile from now on; None: with the one by rule."""
    library.fused_cnn_choose_tile.restype = ctypes.c_bool
    if tile is not None and len(tile) != 4:
        raise ValueError(f"a tile is (kind, m, n, k), got {tile}")
    chosen = None if tile is None else (ctypes.c_int * 4)(*tile)
    if not library.fused_cnn_choose_tile(_values(library, problem), _major(problem), chosen):
        raise ValueError(f"no tile {tile} may run {problem}")


def refuse_tile(library: ctypes.CDLL, problem: Problem, tile: Tile, refused: bool = True) -> None:
    """Run nothing of this problem's device and dtype with that tile from now on, or (refused=False) what asks for it
    again; cuDNN's own cannot be refused."""
    library.fused_cnn_refuse_tile.restype = ctypes.c_bool
    named = (ctypes.c_int * 4)(*tile)
    library.fused_cnn_refuse_tile(_values(library, problem), _major(problem), named, ctypes.c_bool(refused))


def slice_step(device: torch.device) -> int:
    """Where the CUDA library's products with several destinations look for the weights of each: at multiples of this
    many rows."""
    assert cuda.loaded is not None
    found: int = cuda.loaded.fused_cnn_slice_step(torch.cuda.get_device_capability(device)[0])
    return found


def withdraw(op: str, backend: str, device_type: str) -> None:
    """Say from now on that the backend has no kernel of this op."""
    _implemented[op, backend, device_type] = False


def problems_of(library: ctypes.CDLL, work: Callable[[], object]) -> list[Problem]:
    """The problems that a piece of work has, each once."""
    size = library.fused_cnn_problem_values()
    record = library.fused_cnn_record_problems
    found = (ctypes.c_int64 * size * RECORDED)()
    record.restype, record.argtypes = ctypes.c_int64, [ctypes.c_bool, type(found), ctypes.c_int64]
    record(True, found, 0)
    try:
        work()
    finally:
        count = min(record(False, found, RECORDED), RECORDED)
    return list(dict.fromkeys(tuple(problem) for problem in found[:count]))


def in_tf32(library: ctypes.CDLL, work: Callable[[], Any]) -> Callable[[], Any]:
    """`work`, its convolutions of float32 in TF32 whatever PyTorch's switch says, which is every thread's."""

    def call() -> Any:
        library.fused_cnn_take_tf32(ctypes.c_bool(True))
        try:
            return work()
        finally:
            library.fused_cnn_take_tf32(ctypes.c_bool(False))

    return call


cpu.load()
if torch.backends.cuda.is_built():
    cuda.load()
