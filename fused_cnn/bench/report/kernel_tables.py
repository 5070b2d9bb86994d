"""Results of `fused-cnn profile` as tables: networks' steps, and the kernels that each spends its time in."""

from __future__ import annotations

import re

from ..results import Row
from .tables import LABELS, Cells, Rows, Table, failure, named, timed

SHOWN = ("fused", "compile")  # the variants whose kernels a table lists
MOST = 10  # kernels of each
LONGEST_NAME = 64
# Templates that serve many purposes, and the words around the argument that says which.
GENERAL = re.compile(r"^(\w*elementwise_kernel|reduce_kernel|device_kernel|Kernel)$")
AROUND = re.compile("at|native|c10|cutlass|gemm|kernel|gpu_kernel_impl_nocast|ReduceOp|BFloat16|Half|float")


def name(row: Row) -> str:
    """The table of a row's network and pass."""
    return f"kernels-{row['model']}-{row['pass'].split()[0]}"


def steps(rows: Rows) -> Table:
    """What a step takes, and how much of that the device is busy."""
    headings = [*LABELS, "variant", "ms a step", "images/s", "device busy ms", "busy", "launches"]
    return headings, [_step(row) for row in rows]


def _step(row: Row) -> Cells:
    cells = [*(str(row[label]) for label in LABELS), named(row["variant"])]
    if "error" in row:
        return [*cells, failure(row), *[""] * 4]
    ms, busy = row["ms"], row["busy_ms"]
    cells += [f"{ms:.3g}", f"{row['batch'] / ms * 1e3:.0f}", f"{busy:.3g}", f"{min(1, busy / ms):.0%}"]
    return [*cells, str(row["launches"])]


def kernels(rows: Rows) -> Table:
    """The kernels in which fused and torch.compile spend most of one network's step, of one pass."""
    found: list[Cells] = []
    for row in timed(row for row in rows if row["variant"] in SHOWN):
        merged: dict[str, tuple[int, float]] = {}
        for kernel, launches, microseconds in row["kernels"]:
            before = merged.get(short_name(kernel), (0, 0.0))
            merged[short_name(kernel)] = before[0] + launches, before[1] + microseconds / 1e3
        longest = sorted(merged.items(), key=lambda item: -item[1][1])[:MOST]
        rest = row["launches"] - sum(n for _, (n, _) in longest), row["busy_ms"] - sum(ms for _, (_, ms) in longest)
        lines = [(f"`{kernel}`", of) for kernel, of in longest] + ([("all others", rest)] if rest[0] else [])
        labels = [row["dtype"], str(row["batch"]), named(row["variant"])]
        found += [[*labels, kernel, str(n), f"{ms:.3g}", f"{ms / row['busy_ms']:.0%}"] for kernel, (n, ms) in lines]
    return ["dtype", "batch", "variant", "kernel", "launches", "ms", "of the busy time"], found


def short_name(kernel: str) -> str:
    """A kernel's name without namespaces and arguments; of a general template the argument that says what it is for."""
    text = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    head, *rest = re.split(r"(?<=\w)[<(]", text, maxsplit=1)
    if rest or kernel.startswith("void "):
        head = head.rpartition("::")[2]
    if rest and GENERAL.search(head):
        words = (word for word in re.findall(r"[A-Za-z_]\w*", rest[0]) if not AROUND.fullmatch(word))
        head = f"{head} {next(words, '')}".rstrip()
    return head if len(head) <= LONGEST_NAME else f"{head[: LONGEST_NAME - 3]}..."
