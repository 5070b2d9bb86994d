"""Saved results as tables: headings and rows of text."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from ..peers import FUSED, OURS
from ..results import Result, Row

Cells = list[str]
Table = tuple[Cells, list[Cells]]
Rows = Sequence[Row]
Columns = Mapping[str, Callable[[Row], str]]  # by heading, what a row has in it
PEERS = ("eager", "library", "compile", "reduce-overhead", "autotune", "graph", "onnxruntime", "openvino")
VARIANTS = (*PEERS, "native", "triton", *FUSED)
NAMES = {
    "library": "PyTorch's fused call",
    "compile": "torch.compile",
    "autotune": "max-autotune",
    "graph": "CUDA graph",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "fused graph": "fused as a CUDA graph",
    "fused compile": "torch.compile of fused",
    "fused dynamic": "dynamic torch.compile of fused",
    "fused package": "AOTInductor package of optimized",
}
LABELS = ["model", "pass", "dtype", "batch"]
SHOWN = ("fused", "compile")  # the variants whose kernels a table lists
MOST = 10  # kernels of each
LONGEST_NAME = 64
# Templates that serve many purposes, and the words around the argument that says which.
GENERAL = re.compile(r"^(\w*elementwise_kernel|reduce_kernel|device_kernel|Kernel)$")
AROUND = re.compile("at|native|c10|cutlass|gemm|kernel|gpu_kernel_impl_nocast|ReduceOp|BFloat16|Half|float")


def named(variant: str) -> str:
    return NAMES.get(variant, variant)


def table(rows: Iterable[Row], labels: Sequence[str], columns: Columns) -> Table:
    """A line for each row: its labels, and what the columns make of it. One that failed says why instead."""
    lines = []
    for row in rows:
        cells = [named(str(row.get(label, ""))) for label in labels]
        if "error" in row:
            cells += [f"**failed**: {row['error']}".replace("|", "/"), *[""] * (len(columns) - 1)]
        else:
            cells += [cell(row) for cell in columns.values()]
        lines.append(cells)
    return [*labels, *columns], lines


def markdown(headings: Cells, rows: list[Cells]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def source(result: Result) -> str:
    """Where, with what and when a result was measured."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v != "not installed")
    driver = f", driver {result['driver']}" if result.get("driver") else ""
    commit = result["commit"] or "unknown"
    text = f"\n{result['device_name']}{driver}; {versions}; commit {commit}; {result['date'][:10]}."
    if ceilings := result.get("ceilings"):
        copy = f"a copy {ceilings['copy'] / 1e9:.4g} GB/s"
        products = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in ceilings["product"].items())
        text += f" Limits, measured in the same run: {copy}, a matrix product {products}."
        if cache := ceilings.get("cache"):
            text += f" What fits in the {cache / (1 << 20):.4g} MiB of the last-level cache has no limit of memory."
    if result.get("left_out"):
        text += f" {result['left_out']} more rows of this run were not measured."
    if more := result.get("more_with_full", {}).get(result.get("table")):
        text += f" These are the telling rows; `pytest benchmarks --full` has {more} more."
    if not result.get("checked", True):
        text += " Timed without a check of the numbers, which is the tests' business."
    if "note" in result:
        text += f" {result['note']}"
    return text + "\n"


def timed(rows: Iterable[Row]) -> list[Row]:
    """Those that did not fail."""
    return [row for row in rows if "error" not in row]


def variants_in(rows: Rows) -> list[str]:
    return [v for v in VARIANTS if any(v in row.get("times", {}) for row in rows)]


def best_peer(row: Row) -> tuple[float, str]:
    """The median of the fastest variant that is not ours, in seconds, and its name."""
    return min((times["median"], v) for v, times in row["times"].items() if v not in OURS)


def _of_limit(row: Row) -> str:
    """Fused's share of the limit. Work that moves its bytes within the cache has none; nor has an older row, whose
    limit is a direct convolution's, where a form with fewer products passed that."""
    share = row["share_of_limit"]["fused"]
    if row.get("bound") == "cache":
        return "in cache"
    return f"{share:.0%}" if share <= 1 or "bound" in row else ""


def _against_best_peer(row: Row) -> str:
    median, peer = best_peer(row)
    return f"{median / row['times']['fused']['median']:.2f}x ({named(peer)})"


FIGURES: Columns = {
    "spread": lambda row: f"{max((t['high'] - t['low']) / t['median'] for t in row['times'].values()):.0%}",
    "fused / eager": lambda row: f"{row['ratios']['fused']:.2f}x",
    "fused / best peer": _against_best_peer,
    "GB/s": lambda row: f"{row['gb_per_s']['fused']:.3g}",
    "TFLOP/s": lambda row: f"{row['tflop_per_s']['fused']:.3g}",
    "of the limit": _of_limit,
}


def medians(variants: Iterable[str]) -> Columns:
    """Milliseconds of each variant that a row has."""

    def median(variant: str, row: Row) -> str:
        return f"{row['times'][variant]['median'] * 1e3:.3g}" if variant in row["times"] else ""

    return {f"{named(v)} ms": partial(median, v) for v in variants}


def bench(rows: Rows, subject: str) -> Table:
    """Ops or models: every variant's median, and fused against eager and against its fastest peer."""
    labels = [subject, *(["case"] if subject == "op" else []), "pass", "dtype", "batch"]
    return table(rows, labels, {**medians(variants_in(rows)), **FIGURES})


def remarks(rows: Rows) -> str:
    """How often fused, and optimized, is slower than the fastest peer; which variants could not be timed, and why."""
    lines = []
    for variant in ("fused", "optimized"):
        right = [row for row in timed(rows) if variant in row["times"]]
        lost = sum(best_peer(row)[0] < row["times"][variant]["median"] for row in right)
        if right:
            lines.append(f"{variant.capitalize()} is slower than its fastest peer in {lost} of {len(right)} rows.")
    why = Counter(absent for row in rows for absent in row.get("absent", {}).items())
    lines += [f"Not timed in {n} of {len(rows)} rows: {named(v)} ({reason})." for (v, reason), n in why.items()]
    return "".join(f"\n{line}\n" for line in lines)


def headlines(results: Iterable[Result]) -> Table:
    """A line for each network and pass at its largest batch: fused against eager and against its fastest peer.
    `results` are of `bench`, or of `profile` where `bench` has none of that pass."""
    found: dict[tuple[str, str], Cells] = {}
    for result in sorted(results, key=lambda r: r["kind"] == "bench"):
        steps: dict[tuple[Any, ...], dict[str, float]] = {}
        for row in timed(result["rows"]):
            times = {v: t["median"] * 1e3 for v, t in row.get("times", {}).items()} or {row["variant"]: row["ms"]}
            steps.setdefault((row["batch"], row["model"], row["pass"], row["dtype"]), {}).update(times)
        device = result["device_name"].partition(",")[0]
        for (batch, model, step, dtype), ms in sorted(steps.items()):
            if {"eager", "fused"} <= ms.keys():
                peer = min((v for v in ms if v in PEERS), key=ms.__getitem__)
                ratio = ms["fused"] / ms[peer]
                verdict = f"**loses by {ratio:.2f}x**" if ratio > 1 else f"wins by {1 / ratio:.2f}x"
                others = [v for v in FUSED[1:] if v in ms]
                found[model, step] = [
                    *(model, step, f"{dtype}, batch {batch}", device),
                    *(f"{ms['eager']:.3g}", f"{ms[peer]:.3g} ({named(peer)})", f"{ms['fused']:.3g}", verdict),
                    ", ".join(f"{ms[v]:.3g} {named(v).removeprefix('fused ')}" for v in others),
                ]
    headings = ["network", "pass", "of", "on", "eager ms", "fastest peer ms", "fused ms", "fused", "fused otherwise ms"]
    return headings, [line for _, line in sorted(found.items())]


def memory(rows: Rows) -> Table:
    """What models launch, move and keep: eager -> fused -> optimized, where that is counted."""

    def arrow(values: Mapping[str, int] | None, unit: float = 1e6) -> str:
        counted = values or {}
        return " -> ".join(f"{counted[v] / unit:.0f}" for v in ("eager", "fused", "optimized") if v in counted)

    columns: Columns = {
        "launches": lambda row: arrow(row["launches"], 1),
        "traffic MB (minimum)": lambda row: f"{arrow(row.get('traffic'))} ({row['bytes'] / 1e6:.0f})",
        "kept for backward MB": lambda row: arrow(row.get("saved")),
        "peak memory MB": lambda row: arrow(row["peak"]),
    }
    return table(timed(rows), LABELS, columns)


def verify(result: Result) -> Table:
    def traffic(row: Row) -> str:
        eager, fused, least = (row["traffic"]["eval"][v]["bytes"] / 1e6 for v in ("eager", "fused", "minimum"))
        return f"{eager:.0f} -> {fused:.0f} ({least:.0f})"

    models = result["models"].items()
    optimized: Columns = {"optimized ms": lambda row: f"{row['time']['eval']['optimized']['median'] * 1e3:.1f}"}
    columns: Columns = {
        "blocks fused": lambda row: f"{len(row['fused'])} of {len(row['fused']) + len(row['skipped'])}",
        "eager ms": lambda row: f"{row['time']['eval']['eager']['median'] * 1e3:.1f}",
        "fused ms": lambda row: f"{row['time']['eval']['fused']['median'] * 1e3:.1f}",
        **(optimized if all("optimized" in row["time"]["eval"] for _, row in models) else {}),
        "fused / eager": lambda row: f"{row['time']['eval']['ratio']:.2f}x",
        "launches": lambda row: " -> ".join(str(row["traffic"]["eval"][v]["launches"]) for v in ("eager", "fused")),
        "traffic MB (minimum)": traffic,
        "scores - float64: fused (eager)": lambda row: "{error:.1e} ({eager_error:.1e})".format(**row["scores"]),
        "numbers agree": lambda row: "yes" if row["ok"] else "**no**",
    }
    return table([{"model": name, **found} for name, found in models], ["model"], columns)


def load(rows: Rows) -> Table:
    """A service under load, variant by variant."""
    columns: Columns = {
        "images/s": lambda row: f"{row['images_per_second']:.1f}",
        "p50 ms": lambda row: f"{row['p50'] * 1e3:.0f}",
        "p99 ms": lambda row: f"{row['p99'] * 1e3:.0f}",
        "mean batch": lambda row: f"{row['mean_batch']:.1f}",
        "answers": lambda row: str(len(row["seconds"])),
    }
    return table(rows, ["network", "clients", "variant"], columns)


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
