"""Results of `fused-cnn profile` as tables: networks' steps, and the kernels that each spends its time in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from ..results import Row
from .tables import LABELS, Cells, Columns, Rows, Table, named, table, timed

SHOWN = ("fused", "compile")  # the variants whose kernels a table lists
MOST = 10  # kernels of each
LONGEST_NAME = 64
# Templates that serve many purposes, and the words around the argument that says which.
GENERAL = re.compile(r"^(\w*elementwise_kernel|reduce_kernel|device_kernel|Kernel)$")
AROUND = re.compile("at|native|c10|cutlass|gemm|kernel|gpu_kernel_impl_nocast|ReduceOp|BFloat16|Half|float")


def name(row: Row) -> str:
    """The table of a row's network and pass."""
    return f"kernels-{row['model']}-{row['pass'].split()[0]}"


def steps(rows: Rows, **more: Callable[[Row], str]) -> Table:
    """What a step takes, and how much of that the device is busy."""
    columns: Columns = {
        "ms a step": lambda row: f"{row['ms']:.3g}",
        "images/s": lambda row: f"{row['batch'] / row['ms'] * 1e3:.0f}",
        "device busy ms": lambda row: f"{row['busy_ms']:.3g}",
        "busy": lambda row: f"{min(1, row['busy_ms'] / row['ms']):.0%}",
        "launches": lambda row: str(row["launches"]),
        **more,
    }
    return table(rows, [*LABELS, "variant"], columns)


def kernels(rows: Rows) -> Table:
    """The kernels in which fused and torch.compile spend most of one network's step, of one pass."""
    found: list[Cells] = []
    for row in timed(row for row in rows if row["variant"] in SHOWN):
        launches: Counter[str] = Counter()
        busy: dict[str, float] = {}
        for kernel, n, microseconds in row["kernels"]:
            kernel = short_name(kernel)
            launches[kernel] += n
            busy[kernel] = busy.get(kernel, 0.0) + microseconds / 1e3
        longest = sorted(busy, key=lambda kernel: -busy[kernel])[:MOST]
        lines = [(f"`{kernel}`", launches[kernel], busy[kernel]) for kernel in longest]
        if others := row["launches"] - sum(n for _, n, _ in lines):
            lines.append(("all others", others, row["busy_ms"] - sum(ms for *_, ms in lines)))
        labels = [row["dtype"], str(row["batch"]), named(row["variant"])]
        found += [[*labels, kernel, str(n), f"{ms:.3g}", f"{ms / row['busy_ms']:.0%}"] for kernel, n, ms in lines]
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
