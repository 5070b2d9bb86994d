"""Runs every op on small work, forward and backward, and names each call that fails.

`--smoke`: one real layer of each op, compared with float64, to see in seconds whether anything is broken. Without it:
all small cases in each dtype and layout, work for `compute-sanitizer --tool memcheck python scripts/small_cases.py`;
numbers are then the tests' business. `--control`: convolutions and ReLU of PyTorch alone; what a sanitizer reports of
them is its own mistake. On a GPU where there is one, else on the CPU.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from fused_cnn import _backends, _library
from fused_cnn._trees import leaves_of
from fused_cnn.ops._cases import Case, Maker, OpCases
from fused_cnn.testing import all_cases, compare

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
LAYOUTS = ("channels_last", "offset")
LARGEST = 1 << 16  # elements of x: a sanitizer makes kernels a hundred times slower
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # float32's bounds are those of float32
Call = tuple[str, Callable[[], None]]


def smoke(ops: list[OpCases], backend: str) -> Iterator[Call]:
    """One real layer of each op at batch 2."""
    for cases in ops:
        case = next(case for case in cases.cases if case.real).batched(2)
        for dtype in (torch.bfloat16, torch.float32):
            yield f"{cases.name}, {case.name}, {dtype}", partial(_compare, cases, case, dtype, backend)


def small(ops: list[OpCases], backend: str) -> Iterator[Call]:
    """Every op's small cases in a dtype and layout, then in the next: what is cut off has seen every op."""
    for dtype in DTYPES:
        for layout in LAYOUTS:
            for cases in ops:
                for case in cases.cases:
                    if torch.Size(case.shape).numel() <= LARGEST:
                        yield (
                            f"{cases.name}, {case.name}, {dtype}, {layout}",
                            partial(_call, cases, case, dtype, layout, backend),
                        )


def control(*_: object) -> Iterator[Call]:
    """PyTorch's convolution of each small case that has one, read by its ReLU, whichever op is asked for."""
    cases = next(cases for cases in all_cases() if cases.name == "conv_bias_relu")
    for case in cases.cases:
        if torch.Size(case.shape).numel() <= LARGEST:
            yield f"torch.relu of torch.conv2d, {case.name}", partial(_convolve, cases, case)


def _compare(cases: OpCases, case: Case, dtype: torch.dtype, backend: str) -> None:
    for comparison in compare(cases, case, backend, dtype, device=DEVICE):
        assert comparison.ok, f"{comparison}"


def _call(cases: OpCases, case: Case, dtype: torch.dtype, layout: str, backend: str) -> None:
    args, kwargs = cases.make(case, Maker(dtype, layout, DEVICE))
    leaves = leaves_of((args, kwargs))
    out = cases.op(*args, **kwargs, backend=backend)
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def _convolve(cases: OpCases, case: Case) -> None:
    (x, weight, *_), kwargs = cases.make(case, Maker(torch.bfloat16, "channels_last", DEVICE, grad=False))
    torch.relu(torch.conv2d(x, weight, **{k: v for k, v in kwargs.items() if k != "relu"}))


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()  # so that an error is this call's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=("native", "triton"), default="native")
    parser.add_argument("--op", help="this op alone")
    of = parser.add_mutually_exclusive_group()
    of.add_argument("--smoke", action="store_const", dest="of", const=smoke, help="real layers, with float64")
    of.add_argument(
        "--control", action="store_const", dest="of", const=control, help="PyTorch's own convolutions alone"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="make no call after so long")
    arguments = parser.parse_args()
    backend = arguments.backend
    status = _backends.status(backend, DEVICE)
    if not status.on:
        raise SystemExit(f"small_cases: {backend} is off on {DEVICE}: {status.reason}; {status.hint}")
    ops = [c for c in all_cases() if arguments.op in (None, c.name) and _library.has_kernel(c.decides, backend, DEVICE)]
    calls = list((arguments.of or small)(ops, backend))
    end = time.monotonic() + 60 * arguments.minutes
    failed, made = [], 0
    for name, call in calls:
        if time.monotonic() > end:
            break
        made += 1
        try:
            call()
            _synchronize()
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            print(f"small_cases: {failed[-1]}", flush=True)
            try:
                _synchronize()
            except Exception:
                print("small_cases: the device is lost, and with it every later call", flush=True)
                break
    print(
        f"small_cases: {made} of {len(calls)} calls of {backend} on {DEVICE}, forward and backward; {len(failed)} "
        f"failed"
    )
    if failed:
        raise SystemExit("\n".join(failed[:10]))


if __name__ == "__main__":
    main()
