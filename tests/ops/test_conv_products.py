"""Products of 16-bit matrices around the edges of their tiles: m, n and k one step below, on and above, in every form,
and the gradients of what they computed.

On a GPU the kernels themselves run. Elsewhere plain loops stand in for the main loop, with tiles of 16 x 32, in front
of the real epilogue (tests/simt), and the sizes are around those.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch
from conftest import DEVICE, backends
from torch import Tensor

from fused_cnn.ops import conv1x1_bias_relu
from fused_cnn.ops._cases import Case
from fused_cnn.testing import all_cases, compare

GPU = DEVICE == "cuda"
DTYPES = (torch.float16, torch.bfloat16)
Size = tuple[int, int, int]  # m pixels, n channels of the result, k of x


@pytest.fixture(autouse=True)
def _kernels(request: pytest.FixtureRequest) -> None:
    if not GPU:
        request.getfixturevalue("checked_memory")


def around(*edges: int, step: int = 1) -> list[int]:
    return sorted({step, *(e + d for e in edges for d in (-step, 0, step))})


def each_pair(ms: list[int], ns: list[int], ks: list[int]) -> list[Size]:
    """Every m with every n, and k in turn."""
    return [(m, n, ks[(i + j) % len(ks)]) for i, m in enumerate(ms) for j, n in enumerate(ns)]


def sizes() -> list[Size]:
    """Tiles' edges, chunks of the rows of a weight's gradient, and on a GPU what its multiprocessors take twice, as
    wide tiles."""
    if not GPU:
        return [*each_pair(around(16), around(32, 64, step=8), [8, 24, 32, 40]), (900, 72, 8)]
    narrow = each_pair(around(64, 128, 256, 512), around(16, 64, 128, 256, step=8), [8, 24, 56, 64, 72, 120, 128, 136])
    twice = 2 * torch.cuda.get_device_properties(0).multi_processor_count
    wide = [
        s
        for n in (72, 120, 128, 136, 248)
        for s in each_pair(around(128 * twice // ((n + 127) // 128)), [n], [8, 64, 72, 200])
    ]
    return narrow + wide


def every_run() -> Iterator[object]:
    """Native kernels take every size in one test; Triton compiles for each, so it takes a few, each in a test of its
    own."""
    for backend in backends() if GPU else ["simt"]:
        found = [sizes()] if backend != "triton" else [[size] for size in sizes()[::13]]  # a diagonal of them
        for form, dtype, some in itertools.product(FORMS if backend != "triton" else ["residual"], DTYPES, found):
            label = f"{backend}-{form}-{str(dtype)[6:]}" + ("-{}x{}x{}".format(*some[0]) if len(some) == 1 else "")
            yield pytest.param(backend, form, dtype, some, id=label.replace(" ", "_"))


FORMS = {  # bias, residual, ReLU, pitched: rows with a gap between them, on 16 bytes
    "bias": (True, False, True, False),
    "residual": (True, True, True, False),
    "bare": (False, False, False, True),
    "pitched residual": (True, True, False, True),
}


def rows(m: int, channels: int, dtype: torch.dtype, pitched: bool) -> Tensor:
    gap = 8 if pitched else 0
    return torch.randn(m, channels + 2 * gap, device=DEVICE).to(dtype)[:, gap : gap + channels]


def as_pixels(t: Tensor) -> Tensor:
    return t[None, None].permute(0, 3, 1, 2)


def as_rows(t: Tensor) -> Tensor:
    return t[0, :, 0].t()


def check(
    backend: str, dtype: torch.dtype, size: Size, *, bias: bool, residual: bool, relu: bool, pitched: bool
) -> None:
    """The product and the gradients behind it against float64, whose mask is that of the result."""
    m, n, k = size
    x, grad = rows(m, k, dtype, pitched), rows(m, n, dtype, pitched)
    weight = (torch.randn(n, k, device=DEVICE) * (2 / k) ** 0.5).to(dtype)
    vector = torch.randn(n, device=DEVICE).to(dtype) if bias else None
    added = rows(m, n, dtype, pitched) if residual else None
    given = [as_pixels(x), weight[:, :, None, None], vector, None if added is None else as_pixels(added)]
    given = [t if t is None else t.detach().requires_grad_() for t in given]
    out = conv1x1_bias_relu(*given, relu=relu, backend=backend)
    grads = torch.autograd.grad(out, [t for t in given if t is not None], as_pixels(grad))

    exact = x.double() @ weight.double().t()
    for addend in (vector, added):
        exact = exact if addend is None else exact + addend.double()
    masked = grad.double().masked_fill(as_rows(out) <= 0, 0) if relu else grad.double()
    pairs = {"out": (as_rows(out), exact.relu() if relu else exact)}
    pairs["grad_x"] = as_rows(grads[0]), masked @ weight.double()
    pairs["grad_weight"] = grads[1].flatten(1), masked.t() @ x.double()
    if bias:
        pairs["grad_bias"] = grads[2], masked.sum(0)
    if residual:
        pairs["grad_residual"] = as_rows(grads[-1]), masked
    for what, (found, true) in pairs.items():
        # Half of it once more where cuBLAS's or oneDNN's product is rounded before the residual is added.
        eps = torch.finfo(dtype).eps
        bounds = {"rtol": eps, "atol": eps / 2 * true.abs().max().item()}
        torch.testing.assert_close(found.double(), true, **bounds, msg=lambda text, w=what: f"{w} of {size}: {text}")


@pytest.mark.parametrize(("backend", "form", "dtype", "some"), list(every_run()))
def test_products_and_their_gradients(backend: str, form: str, dtype: torch.dtype, some: list[Size]) -> None:
    bias, residual, relu, pitched = FORMS[form]
    for size in some:
        check(backend, dtype, size, bias=bias, residual=residual, relu=relu, pitched=pitched)


# Three products of x in one: widths of branch 1, of the reductions before the 3x3 and the 5x5.
SLICES = (
    [(64, 8, 56), (8, 64, 8), (120, 16, 64), (128, 136, 24), (72, 56, 8)]
    if GPU
    else [(8, 8, 8), (24, 16, 8), (32, 8, 40)]
)
SIDES = [(7, 9), (8, 8), (5, 13), (2, 257)] if GPU else [(4, 4), (3, 11)]
INCEPTION = next(o for o in all_cases() if o.name == "inception")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", SLICES, ids=str)
@pytest.mark.parametrize("backend", backends() if GPU else ["simt"])
def test_a_product_with_three_destinations(backend: str, widths: Size, dtype: torch.dtype) -> None:
    first, reduce3, reduce5 = widths
    channels = {"widths": (first, reduce3, 8, reduce5, 16, 24), "kernel5": 3}
    for height, width in SIDES:
        case = Case(f"{widths} {height}x{width}", (1, 40, height, width), channels)
        for comparison in compare(INCEPTION, case, backend, dtype, device=DEVICE):
            assert comparison.ok, (case.name, comparison)
