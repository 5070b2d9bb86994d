"""Runs every op once on its small cases, forward and backward, in each backend, dtype and layout: work for compute-sanitizer.

`compute-sanitizer --tool memcheck python scripts/small_cases.py`; without a GPU it runs on the CPU. Numbers are the tests' business.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_cnn import _backends, _library
from fused_cnn.ops._cases import Maker
from fused_cnn.testing import all_cases

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("channels_last", "offset")
LARGEST = 1 << 16  # elements of x: a sanitizer makes kernels a hundred times slower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=("native", "triton"), default="native")
    parser.add_argument("--op", help="this op alone")
    arguments = parser.parse_args()
    backend = arguments.backend
    device = "cuda" if torch.cuda.is_available() else "cpu"
    status = _backends.status(backend, device)
    if not status.on:
        raise SystemExit(f"small_cases: {backend} is off on {device}: {status.reason}; {status.hint}")
    calls = 0
    for cases in all_cases():
        if arguments.op not in (None, cases.name) or not _library.has_kernel(cases.decides, backend, device):
            continue
        for case in cases.cases:
            if torch.Size(case.shape).numel() > LARGEST:
                continue
            for dtype in DTYPES:
                for layout in LAYOUTS:
                    args, kwargs = cases.make(case, Maker(dtype, layout, device))
                    leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
                    out = cases.op(*args, **kwargs, backend=backend)
                    torch.autograd.grad(out, leaves, torch.ones_like(out))
                    calls += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"small_cases: {calls} calls of {backend} on {device}, forward and backward")


if __name__ == "__main__":
    main()
