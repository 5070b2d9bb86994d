"""Saved results as tables: headings and rows of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._peers import OURS

Row = list[str]
Table = tuple[Row, list[Row]]
PEERS = ("eager", "library", "compile", "autotune", "graph", "onnxruntime", "openvino")
VARIANTS = (*PEERS, "native", "triton", "fused", "fused graph", "fused compile")
NAMES = {
    "library": "library's fused call",
    "compile": "torch.compile",
    "autotune": "max-autotune",
    "graph": "CUDA graph",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "fused graph": "fused as a CUDA graph",
    "fused compile": "torch.compile of fused",
}


def markdown(headings: Row, rows: list[Row]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def source(result: dict[str, Any]) -> str:
    """Where, with what and when a result was measured."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v != "not installed")
    driver = f", driver {result['driver']}" if result.get("driver") else ""
    text = f"\n{result['device_name']}{driver}; {versions}; commit {result['commit'] or 'unknown'}; {result['date'][:10]}."
    if "ceilings" in result:
        products = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in result["ceilings"]["product"].items())
        text += f" Limits, measured in the same run: a copy {result['ceilings']['copy'] / 1e9:.4g} GB/s, a matrix product {products}."
    if result.get("left_out"):
        text += f" {result['left_out']} more rows of this run were not measured."
    if more := result.get("more_with_full", {}).get(result.get("table")):
        text += f" These are the telling rows; `pytest benchmarks --full` has {more} more."
    if not result.get("checked", True):
        text += " Timed without a check of the numbers, which is the tests' business."
    if "note" in result:
        text += f" {result['note']}"
    return text + "\n"


def variants_in(rows: list[dict[str, Any]]) -> list[str]:
    return [v for v in VARIANTS if any(v in row.get("times", {}) for row in rows)]


def best_peer(row: dict[str, Any]) -> str:
    """The fastest variant that is not ours."""
    return min((v for v in row["times"] if v not in OURS), key=lambda v: row["times"][v]["median"])


def bench(rows: list[dict[str, Any]], subject: str) -> Table:
    """Ops or models: every variant's median, and fused against eager and against its fastest peer."""
    variants = variants_in(rows)
    labels = [subject, *(["case"] if subject == "op" else []), "pass", "dtype", "batch"]
    headings = [*labels, *(f"{NAMES.get(v, v)} ms" for v in variants), "spread", "fused / eager", "fused / best peer", "GB/s", "TFLOP/s"]
    return [*headings, "of the limit"], [_bench_row(row, labels, variants) for row in rows]


def _bench_row(row: dict[str, Any], labels: Row, variants: list[str]) -> Row:
    cells = [str(row[label]) for label in labels]
    if "error" in row:
        return [*cells, failure(row), *[""] * (len(variants) + 5)]
    times = row["times"]
    cells += [f"{times[v]['median'] * 1e3:.3g}" if v in times else "" for v in variants]
    spread = max((t["high"] - t["low"]) / t["median"] for t in times.values())
    peer = best_peer(row)
    against = times[peer]["median"] / times["fused"]["median"]
    cells += [f"{spread:.0%}", f"{row['ratios']['fused']:.2f}x", f"{against:.2f}x ({NAMES.get(peer, peer)})"]
    return [*cells, *(f"{row[k]['fused']:.3g}" for k in ("gb_per_s", "tflop_per_s")), f"{row['share_of_limit']['fused']:.0%}"]


def failure(row: Mapping[str, Any]) -> str:
    return f"**failed**: {row['error']}".replace("|", "/")


def absences(rows: list[dict[str, Any]]) -> str:
    """Which variants could not be timed in some of these rows, and why."""
    why: dict[tuple[str, str], int] = {}
    for row in rows:
        for variant, reason in row.get("absent", {}).items():
            why[variant, reason] = why.get((variant, reason), 0) + 1
    lines = [f"Not timed in {n} of {len(rows)} rows: {NAMES.get(v, v)} ({reason})." for (v, reason), n in why.items()]
    return "".join(f"\n{line}\n" for line in lines)


def losses(rows: list[dict[str, Any]]) -> str:
    """How often fused is slower than the fastest of its peers."""
    timed = [row for row in rows if "error" not in row]
    lost = [row for row in timed if row["times"][best_peer(row)]["median"] < row["times"]["fused"]["median"]]
    return f"\nFused is slower than its fastest peer in {len(lost)} of {len(timed)} rows.\n"


def headlines(results: list[dict[str, Any]]) -> str:
    """A sentence for each network and pass at its largest batch: fused against eager and against its fastest peer. `results` are of
    `bench`, or of `profile` where `bench` has none of that pass."""
    found: dict[tuple[str, str], tuple[dict[str, Any], dict[str, float], str]] = {}
    for result in sorted(results, key=lambda r: r["kind"] == "bench"):
        steps: dict[tuple[Any, ...], dict[str, float]] = {}
        for row in (row for row in result["rows"] if "error" not in row):
            of = {row["variant"]: row["ms"]} if "variant" in row else {v: t["median"] * 1e3 for v, t in row["times"].items()}
            steps.setdefault((row["batch"], row["model"], row["pass"], row["dtype"]), {}).update(of)
        for (batch, model, step, dtype), ms in sorted(steps.items()):
            if {"eager", "fused"} <= ms.keys():
                found[model, step] = {"dtype": dtype, "batch": batch}, ms, result["device_name"].partition(",")[0]
    return "".join(f"- {_headline(f'{model}, {step}', *of)}\n" for (model, step), of in sorted(found.items()))


def _headline(what: str, labels: dict[str, Any], ms: dict[str, float], device: str) -> str:
    peer = min((v for v in ms if v in PEERS), key=ms.__getitem__)
    text = f"{what}, {labels['dtype']}, batch {labels['batch']}, {device}: fused takes {ms['fused']:.3g} ms, eager {ms['eager']:.3g} ms"
    if peer != "eager":
        text += f", {NAMES[peer]} {ms[peer]:.3g} ms"
    ratio = ms["fused"] / ms[peer]
    text += f". **Fused loses to {NAMES.get(peer, peer)} by {ratio:.2f}x**" if ratio > 1 else f". Fused wins by {1 / ratio:.2f}x"
    others = [f"{NAMES.get(v, v)} {ms[v]:.3g} ms" for v in ("fused graph", "fused compile") if v in ms]
    return f"{text} ({', '.join(others)})." if others else f"{text}."


def memory(rows: list[dict[str, Any]]) -> Table:
    """What models launch, move and keep: eager -> fused."""
    headings = ["model", "pass", "dtype", "batch", "launches", "traffic MB (minimum)", "kept for backward MB", "peak memory MB"]

    def arrow(values: dict[str, int] | None, unit: float = 1e6) -> str:
        return f"{values['eager'] / unit:.0f} -> {values['fused'] / unit:.0f}" if values else ""

    def line(row: dict[str, Any]) -> Row:
        traffic = f"{arrow(row.get('traffic'))} ({row['bytes'] / 1e6:.0f})"
        labels = (str(row[k]) for k in ("model", "pass", "dtype", "batch"))
        return [*labels, arrow(row["launches"], 1), traffic, arrow(row.get("saved")), arrow(row["peak"])]

    return headings, [line(row) for row in rows if "error" not in row]


def verify(result: dict[str, Any]) -> Table:
    headings = ["model", "blocks fused", "eager ms", "fused ms", "fused / eager", "launches", "traffic MB (minimum)"]
    headings += ["scores - float64: fused (eager)", "numbers agree"]
    rows = []
    for name, found in result["models"].items():
        time, traffic, scores = found["time"]["eval"], found["traffic"]["eval"], found["scores"]
        eager, fused = (traffic[v] for v in ("eager", "fused"))
        megabytes = [f"{v['bytes'] / 1e6:.0f}" for v in (eager, fused, traffic["minimum"])]
        rows.append(
            [
                name,
                f"{len(found['fused'])} of {len(found['fused']) + len(found['skipped'])}",
                *(f"{time[v]['median'] * 1e3:.1f}" for v in ("eager", "fused")),
                f"{time['ratio']:.2f}x",
                f"{eager['launches']} -> {fused['launches']}",
                f"{megabytes[0]} -> {megabytes[1]} ({megabytes[2]})",
                f"{scores['error']:.1e} ({scores['eager_error']:.1e})",
                "yes" if found["ok"] else "**no**",
            ]
        )
    return headings, rows
