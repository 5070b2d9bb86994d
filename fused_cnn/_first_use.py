"""Before a build's kernels run on a GPU for the first time, those that take a shape's place by rule or by measurement
are compared with PyTorch's operators on the processor.

A kernel may be right on one GPU and wrong on another, or under another driver. The inputs are small whole numbers, so
that sums are exact in any order and results must be equal to the bit; there are enough of them that a persistent block
takes several tiles, and none fills its last tile. What comes out is kept with the device's table (_tables.py): it takes
a second or so, once.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library
from ._trees import mapped, tensors

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE, OP = "tile", "op"  # what a key begins with: a tile of the CUDA library, or a whole op of it
ALL = ("all",)  # the key that says that nothing is left to compare
RIGHT, WRONG = "right", "wrong"
LIBRARY = (3, 0, 0, 0)  # the tile that may run any problem
POOLS = (
    "max_pool2d_fwd",
    "max_pool2d_index_fwd",
    "max_pool2d_index_bwd",
    "inception_fwd",
    "inception_packed_fwd",
    "stem_fwd",
)  # run one another


class Case(NamedTuple):
    """A call of a native op, on the processor in float32, and what it must give."""

    op: str
    arguments: tuple[Any, ...]
    expected: Any  # a tensor, or several
    has_tiles: bool = True


def _whole(generator: torch.Generator, largest: int, *shape: int) -> Tensor:
    t = torch.randint(-largest, largest + 1, shape, generator=generator, dtype=torch.float32, device="cpu")
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def _convolution(
    whole: Callable[..., Tensor], x: Sequence[int], outputs: int, kernel: int, stride: int, padding: int, residual: bool
) -> Case:
    images, weight, bias = whole(1, *x), whole(1, outputs, x[1], kernel, kernel), whole(8, outputs)
    y = F.conv2d(images, weight, bias, stride, padding)
    added = whole(8, *y.shape) if residual else None
    geometry = ([stride, stride], [padding, padding], [1, 1], 1)
    expected = torch.relu(y if added is None else y + added)
    return Case("conv_bias_relu_fwd", (images, weight, bias, added, *geometry, True), expected)


def _inception(whole: Callable[..., Tensor], size: Sequence[int], projected: int = 24, windows: bool = True) -> Case:
    """Few weights of what is not 1x1 are other than zero, and without `windows` none: among many sums some are past
    256, which the library rounds to bfloat16 before it adds the bias."""
    images, *sides = size
    x = whole(1, images, 72, *sides)
    shapes = ((136, 72, 1), (24, 72, 1), (40, 24, 3), (16, 72, 1), (8, 16, 5), (projected, 72, 1))
    weights = [whole(int(windows or side == 1), out, inputs, side, side) for out, inputs, side in shapes]
    for weight in weights:
        if weight.size(2) > 1:
            weight.mul_((torch.arange(weight.size(1)) % 4 == 0).view(1, -1, 1, 1))
    biases = [whole(8, out) for out, *_ in shapes]

    def conv(i: int, of: Tensor) -> Tensor:
        return torch.relu(F.conv2d(of, weights[i], biases[i], padding=shapes[i][2] // 2))

    branches = conv(0, x), conv(2, conv(1, x)), conv(4, conv(3, x)), conv(5, F.max_pool2d(x, 3, 1, 1))
    return Case("inception_fwd", (x, weights, biases), torch.cat(branches, 1))


def _stem(whole: Callable[..., Tensor], x: Sequence[int], padding: int, pool_padding: int, ceil_mode: bool) -> Case:
    images, weight, bias = whole(1, *x), whole(1, 72, x[1], 7, 7), whole(8, 72)
    y = torch.relu(F.conv2d(images, weight, bias, 2, padding))
    expected = F.max_pool2d(y, 3, 2, pool_padding, ceil_mode=ceil_mode)
    return Case("stem_fwd", (images, weight, bias, [2, 2], [padding] * 2, pool_padding, ceil_mode), expected)


def convolutions() -> Iterator[Case]:
    """Those that float32 may run on tensor cores, too, in TF32, in which these numbers are exact. The first has so many
    rows that a persistent block takes several of its tiles."""
    whole = functools.partial(_whole, torch.Generator("cpu").manual_seed(0))
    yield _convolution(whole, (9, 72, 46, 47), 136, 1, 1, 0, residual=True)
    yield _convolution(whole, (3, 72, 11, 13), 136, 3, 1, 1, residual=False)
    yield _convolution(whole, (3, 72, 11, 13), 200, 3, 2, 1, residual=True)
    yield _inception(whole, (3, 11, 13))


def cases() -> Iterator[Case]:
    yield from convolutions()
    whole = functools.partial(_whole, torch.Generator("cpu").manual_seed(1))
    yield _convolution(whole, (3, 16, 11, 13), 24, 5, 1, 2, residual=False)
    yield _convolution(whole, (1, 1032, 7, 7), 72, 1, 1, 0, residual=True)  # split among as many blocks as there may be
    yield _convolution(whole, (3, 3, 45, 37), 72, 7, 2, 3, residual=False)
    # The pool and its projection: several tiles for a block, of parts of an image and of several small ones; tiles
    # beside each other; more outputs than a block has.
    yield _inception(whole, (70, 28, 27), 72, windows=False)
    yield _inception(whole, (801, 7, 7), 136, windows=False)
    yield _inception(whole, (3, 9, 75), 40, windows=False)
    yield _stem(whole, (3, 3, 75, 52), 3, 1, False)
    # Rows on 16 bytes, in tiles as wide as there are: bands of many rows, several for a block, and one for each.
    yield _stem(whole, (40, 3, 39, 232), 3, 1, False)
    yield _stem(whole, (70, 3, 39, 216), 3, 0, True)
    yield _stem(whole, (5, 1, 40, 48), 2, 1, False)
    yield _stem(whole, (5, 2, 40, 48), 0, 0, False)
    x = whole(9, 3, 72, 23, 17)
    for kernel, stride, padding in ((3, 2, 1), (3, 1, 1), (2, 2, 0)):
        window = ([kernel] * 2, [stride] * 2, [padding] * 2, [1, 1], False)
        y, flat = F.max_pool2d(x, kernel, stride, padding, return_indices=True)
        grad = whole(9, *y.shape)
        rows, columns = (torch.arange(n) * stride - padding for n in y.shape[2:])
        places = (flat // x.size(3) - rows.view(-1, 1)) * kernel + flat % x.size(3) - columns
        places = places.to(torch.uint8).contiguous(memory_format=torch.channels_last)
        grad_x = torch.zeros_like(x).flatten(2).scatter_add(2, flat.flatten(2), grad.flatten(2)).view_as(x)
        yield Case("max_pool2d_fwd", (x, *window), y, has_tiles=False)
        yield Case("max_pool2d_index_fwd", (x, *window), (y, places), has_tiles=False)
        yield Case("max_pool2d_index_bwd", (grad, places, [*x.shape[2:]], *window), grad_x, has_tiles=False)


def compare(
    library: ctypes.CDLL,
    kernel: Callable[[str], Callable[..., Tensor]],
    device: torch.device,
    known: Mapping[tuple[Any, ...], str] = {},
) -> dict[tuple[Any, ...], str]:
    """What each tile and each op came to on `device`: RIGHT, WRONG where its results are not PyTorch's, or the error
    that it ended in. ALL is among the keys unless something did not run, behind which nothing more can be said: the
    error may be the device's from then on.

    A key is (TILE, dtype's number, kind, m, n, k), or, of a pool, which has no tiles, (OP, its name). `known` holds
    what came to nothing before, which is not run again. What an error of the moment ended is not in the result.
    """
    found: dict[tuple[Any, ...], str] = {}
    in_16_bits, in_tf32 = list(cases()), list(convolutions())
    for dtype in DTYPES:
        for case in in_tf32 if dtype == torch.float32 else in_16_bits:

            def placed(t: Tensor, to: torch.device = device, dtype: torch.dtype = dtype) -> Tensor:
                return t.to(to, dtype if t.is_floating_point() else t.dtype)

            expected = [placed(t, torch.device("cpu")) for t in tensors(case.expected)]
            key: tuple[Any, ...] = () if case.has_tiles else (OP, case.op)  # of what is run

            def verdict(run: Callable[[], Any], expected: list[Tensor] = expected) -> str:
                found = [t.cpu() for t in tensors(run())]
                return RIGHT if all(map(torch.equal, found, expected)) else WRONG

            def is_out(key: tuple[Any, ...]) -> bool:
                return key in known or found.get(key, RIGHT) != RIGHT

            try:
                run = _library.in_tf32(
                    library, functools.partial(kernel(case.op), *mapped(placed, case.arguments, Tensor))
                )
                if not case.has_tiles and not is_out(key):
                    found[key] = verdict(run)
                problems = _problems(library, run, device) if case.has_tiles else []
                for problem in problems:
                    others = [other for other in problems if other != problem]
                    for tile in _library.tiles_of(library, problem):
                        if tile[0] in _library.LIBRARY_TILES or is_out((TILE, problem[1], *tile)):
                            continue
                        key = (TILE, problem[1], *tile)
                        _choose(library, [problem], tile)
                        _choose(library, others, LIBRARY)  # so that no other tile is to blame
                        try:
                            found[key] = verdict(run)
                        finally:
                            _choose(library, problems, None)
                        key = ()
            except RuntimeError as error:
                momentary = any(word in str(error).lower() for word in ("out of memory", "captur", "alloc"))
                return found if momentary or not key else {**found, key: " ".join(str(error).split()) or "an error"}
    return {**found, ALL: RIGHT}


def refuse(library: ctypes.CDLL, device: torch.device, checks: Mapping[tuple[Any, ...], str]) -> None:
    """See that nothing runs which came to nothing: a tile on this device, an op on every GPU."""
    for (kind, *which), what in checks.items():
        if what != RIGHT and kind == TILE:
            dtype, *tile = which
            problem = (device.index or 0, dtype, *[0] * (library.fused_cnn_problem_values() - 2))
            _library.refuse_tile(library, problem, tuple(tile))
        elif what != RIGHT:
            for op in POOLS:
                _library.withdraw(op, "native", device.type)


def sentence(key: tuple[Any, ...], what: str, gpu: str) -> str:
    """What is said of a kernel that came to nothing."""
    kind, *which = key
    tile = "the tensor-core kernel (dtype {}, kind {}, tile {} x {} x {})"
    name = f"the kernel of {which[0]}" if kind == OP else tile.format(*which)
    did = "gives other results than PyTorch" if what == WRONG else f"does not run ({what})"
    return (
        f"fused_cnn: on this {gpu} {name} {did}, and will not be used; please report it, "
        "with what `fused-cnn info` says"
    )


def _problems(library: ctypes.CDLL, run: Callable[[], Any], device: torch.device) -> list[_library.Problem]:
    """A call's problems on this device, but for a whole block's, whose ways have the same kernels and are compared
    where they are timed (tuning.py)."""
    here = -1 if device.type == "cpu" else device.index or 0
    found = _library.problems_of(library, run)
    return [problem for problem in found if problem[0] == here and problem[-1] != _library.BLOCK]


def _choose(library: ctypes.CDLL, problems: Sequence[_library.Problem], tile: _library.Tile | None) -> None:
    for problem in problems:
        _library.choose_tile(library, problem, tile)


def on_its_own(work: Callable[[], dict[tuple[Any, ...], str]]) -> dict[tuple[Any, ...], str]:
    """What `work` gives in a thread of its own, where none of the caller's modes, autocast and gradients among them,
    are in force. Nothing where no thread can be started any more, as when the interpreter ends."""
    found: dict[tuple[Any, ...], str] = {}
    failed: list[BaseException] = []

    def body() -> None:
        try:
            with torch.no_grad():
                found.update(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=body, name="fused_cnn first use")
    try:
        thread.start()
    except RuntimeError:
        return {}
    try:
        thread.join()
    except BaseException:  # an interrupt: a second comparison must not begin beside this one
        thread.join()
        raise
    if failed:
        raise failed[0]
    return found
