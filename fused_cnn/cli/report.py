"""`fused-cnn report FILE...`: turns saved results (verify, bench, pytest-benchmark) into Markdown tables and
PNG plots.

`--update README.md` rewrites the text between `<!-- table:NAME -->` and `<!-- /table -->`. Tables are named
ops, models, and verify, with `-cuda` added where a GPU made them.
"""

from __future__ import annotations

import json as json_module
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ._common import CommandError, Json, emit, out

MARKED = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
Row = list[str]


def report(
    files: Annotated[list[Path], typer.Argument(help="JSON files that verify, bench or pytest-benchmark saved.")],
    update: Annotated[Path | None, typer.Option(help="Rewrite the marked tables of this Markdown file.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for PNG plots; none without it.")] = None,
    json: Json = False,
) -> None:
    """Make Markdown tables, and with --out plots, from saved results."""
    results = [load(file) for file in files]
    tables: dict[str, str] = {}
    for result in results:
        tables |= tables_of(result)
    plots = [str(path) for result in results for path in _plots(result, folder)] if folder else []
    updated = rewrite(update, tables) if update else []
    if json:
        emit({"tables": tables, "plots": plots, "updated": updated})
        return
    for name, text in tables.items():
        if not update:
            out().print(f"## {name}\n\n{text}", highlight=False, markup=False, soft_wrap=True)
    for path in plots:
        out().print(f"plot: {path}", highlight=False, soft_wrap=True)
    if update:
        out().print(f"{update}: {', '.join(updated)}", highlight=False, soft_wrap=True)


def load(file: Path) -> dict[str, Any]:
    """A saved result in the form of `bench` or `verify`; pytest-benchmark's file becomes one."""
    try:
        document = json_module.loads(file.read_text())
        if "benchmarks" in document:
            rows = [b["extra_info"]["row"] for b in document["benchmarks"] if "row" in b["extra_info"]]
            return {"kind": "bench", **document["benchmarks"][0]["extra_info"]["facts"], "rows": rows}
        if document["kind"] not in ("bench", "verify"):
            raise KeyError(document["kind"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise CommandError(f"{file} is not a result of verify, bench or pytest-benchmark: {error!r}") from error
    return document


def tables_of(result: dict[str, Any]) -> dict[str, str]:
    """Every table that a result has, by name."""
    suffix = "-cuda" if result["device"] == "cuda" else ""
    if result["kind"] == "verify":
        return {f"verify{suffix}": markdown(*_verify(result)) + _source(result)}
    found = {}
    for kind, subject in (("op", "op"), ("model", "model")):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        if rows:
            found[f"{kind}s{suffix}"] = markdown(*_bench(rows, subject)) + _source(result)
    return found


def markdown(headings: Row, rows: list[Row]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _source(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v != "not installed")
    return f"\n{result['device_name']}; {versions}; commit {result['commit'] or 'unknown'}; {result['date'][:10]}.\n"


def _bench(rows: list[dict[str, Any]], subject: str) -> tuple[Row, list[Row]]:
    compiled = any("compile" in row.get("times", {}) for row in rows)
    case = ["case"] if subject == "op" else []
    headings = [subject, *case, "pass", "dtype", "batch", "eager ms", *(["compile ms"] if compiled else []), "fused ms"]
    headings += ["fused / eager", *(["fused / compile"] if compiled else []), "GB/s"]
    return headings, [_bench_row(row, [subject, *case, "pass", "dtype", "batch"], compiled) for row in rows]


def _bench_row(row: dict[str, Any], labels: Row, compiled: bool) -> Row:
    cells = [str(row[label]) for label in labels]
    if "error" in row:
        return [*cells, f"wrong: {row['error']}", *[""] * (5 if compiled else 3)]
    times = {name: t["median"] * 1e3 for name, t in row["times"].items()}
    variants = ("eager", "compile", "fused") if compiled else ("eager", "fused")
    cells += [f"{times[v]:.3g}" if v in times else "" for v in variants]
    cells.append(f"{row['ratios']['fused']:.2f}x")
    if compiled:
        cells.append(f"{times['compile'] / times['fused']:.2f}x" if "compile" in times else "")
    return [*cells, f"{row['gb_per_s']['fused']:.1f}"]


def _verify(result: dict[str, Any]) -> tuple[Row, list[Row]]:
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


def _plots(result: dict[str, Any], folder: Path) -> list[Path]:
    from . import _picture

    suffix = "-cuda" if result["device"] == "cuda" else ""
    if result["kind"] == "verify":
        return [_picture.stages(result, folder / f"verify{suffix}.png")]
    made = []
    for kind in ("op", "model"):
        rows = [row for row in result["rows"] if row["kind"] == kind and "error" not in row]
        keys = (kind, "case", "pass", "dtype", "batch")
        bars = [{"label": " ".join(str(row[k]) for k in keys if k in row), "ratios": row["ratios"]} for row in rows]
        if bars:
            made.append(_picture.speedups(bars, result["device_name"], folder / f"{kind}s{suffix}.png"))
    return made


def rewrite(file: Path, tables: dict[str, str]) -> list[str]:
    """Put tables between their markers; returns the names of those that were."""
    text = file.read_text()
    marked = {m["name"] for m in MARKED.finditer(text)}
    if not marked & tables.keys():
        raise CommandError(f"{file} has no marker for {', '.join(tables)}: add `<!-- table:NAME -->` and `<!-- /table -->`")
    new = MARKED.sub(lambda m: m[1] + tables[m["name"]] + m[3] if m["name"] in tables else m[0], text)
    file.write_text(new)
    return sorted(marked & tables.keys())
