"""`fused-cnn report [FILE | FOLDER]...`: turns saved results (verify, bench, pytest-benchmark, scripts/gpu.sh) into Markdown tables and
PNG plots.

`--update README.md` rewrites the text between `<!-- table:NAME -->` and `<!-- /table -->`. Tables are named verify, inference, training,
memory-inference, memory-training and ops, with `-cuda` added where a GPU made them, and `ran`: which kernels have run on which GPU. Of two
results for one table the later one counts.
"""

from __future__ import annotations

import json as json_module
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _ran, _result_tables
from ._common import CommandError, Json, emit, out
from ._result_tables import markdown, source

RESULTS = Path("benchmarks/results")
KINDS = ("bench", "verify", "tests")
MARKED = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def report(
    places: Annotated[list[Path] | None, typer.Argument(help="JSON files or folders of them; benchmarks/results without any.")] = None,
    update: Annotated[list[Path] | None, typer.Option(help="Rewrite the marked tables of this Markdown file; may be given again.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for PNG plots; none without it.")] = None,
    json: Json = False,
) -> None:
    """Make Markdown tables, and with --out plots, from saved results."""
    results = load_all(places or [RESULTS])
    tables = tables_of(results)
    plots = [str(path) for result in newest(results) for path in _plots(result, folder)] if folder else []
    updated = {str(file): rewrite(file, tables) for file in update or ()}
    if json:
        emit({"tables": tables, "plots": plots, "updated": updated})
        return
    for name, text in tables.items() if not update else ():
        out().print(f"## {name}\n\n{text}", highlight=False, markup=False, soft_wrap=True)
    for path in plots:
        out().print(f"plot: {path}", highlight=False, soft_wrap=True)
    for file, names in updated.items():
        out().print(f"{file}: {', '.join(names)}", highlight=False, soft_wrap=True)


def load_all(places: Iterable[Path]) -> list[dict[str, Any]]:
    """Every result in files and folders; a stage of scripts/gpu.sh without one (a build, the sanitizer) is passed over."""
    files = [f for place in places for f in (sorted(place.rglob("*.json")) if place.is_dir() else [place])]
    if not files:
        raise CommandError(f"no results in {', '.join(map(str, places))}: `fused-cnn bench` and `fused-cnn verify` make some")
    return [result for file in files for result in [load(file)] if result is not None]


def load(file: Path) -> dict[str, Any] | None:
    """A saved result in the form of `bench` or `verify`; pytest-benchmark's file becomes one, a stage's result is taken out of it."""
    try:
        document = json_module.loads(file.read_text())
        if "stage" in document:
            document = {} if document["dry"] else document.get("result") or {}
            return document if document.get("kind") in KINDS else None
        if "benchmarks" in document:
            rows = [b["extra_info"]["row"] for b in document["benchmarks"] if "row" in b["extra_info"]]
            return {"kind": "bench", **document["benchmarks"][0]["extra_info"]["facts"], "rows": rows}
        if document["kind"] not in KINDS:
            raise KeyError(document["kind"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CommandError(f"{file} is not a result of verify, bench, pytest-benchmark or scripts/gpu.sh: {error!r}") from error
    found: dict[str, Any] = document
    return found


TABLES = {"op": "ops", "inference": "inference", "training step": "training", "verify": "verify"}  # by what a row is


def newest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The latest result for each table and kind of device, with that table's rows alone; `table` names it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for result in sorted(results, key=lambda r: r["date"]):
        if result["kind"] == "verify":
            found["verify", result["device"]] = {**result, "table": "verify"}
        for what in ("op", "inference", "training step"):
            rows = [row for row in result.get("rows", ()) if what in (row["kind"], row["pass"] if row["kind"] == "model" else "")]
            if rows:
                found[what, result["device"]] = {**result, "table": TABLES[what], "rows": rows}
    return list(found.values())


def tables_of(results: list[dict[str, Any]]) -> dict[str, str]:
    """Every table that results have, by name."""
    found = {}
    for result in newest(results):
        suffix = "-cuda" if result["device"] == "cuda" else ""
        name = result["table"] + suffix
        if result["kind"] == "verify":
            found[name] = markdown(*_result_tables.verify(result)) + source(result)
            continue
        rows = result["rows"]
        subject = rows[0]["kind"]
        found[name] = markdown(*_result_tables.bench(rows, subject)) + _result_tables.losses(rows) + source(result)
        if subject == "model":
            found[f"memory-{name}"] = markdown(*_result_tables.memory(rows))
    found["ran"] = markdown(*_ran.table(results))
    return found


def _plots(result: dict[str, Any], folder: Path) -> list[Path]:
    from . import _picture

    suffix = "-cuda" if result["device"] == "cuda" else ""
    table = result["table"]
    if table == "verify":
        return [_picture.stages(result, folder / f"verify{suffix}.png")]
    if all("error" in row for row in result["rows"]):
        return []
    if table == "ops":
        return [_picture.roofline(result, folder / f"roofline{suffix}.png")]
    counted = [row for row in result["rows"] if "traffic" in row]
    made = [_picture.traffic({**result, "rows": counted}, folder / f"traffic-{table}{suffix}.png")] if counted else []
    if table == "inference":
        return [*made, _picture.images_per_second(result, folder / f"images{suffix}.png")]
    return [*made, _picture.memory(result, folder / f"memory{suffix}.png")]


def rewritten(text: str, tables: dict[str, str]) -> tuple[str, list[str]]:
    """The text with tables between their markers, and the names of those that were."""
    names = {m["name"] for m in MARKED.finditer(text)} & tables.keys()
    return MARKED.sub(lambda m: m[1] + tables[m["name"]] + m[3] if m["name"] in tables else m[0], text), sorted(names)


def rewrite(file: Path, tables: dict[str, str]) -> list[str]:
    """Put tables between their markers in a file; returns the names of those that were."""
    new, names = rewritten(file.read_text(), tables)
    if not names:
        raise CommandError(f"{file} has no marker for {', '.join(tables)}: add `<!-- table:NAME -->` and `<!-- /table -->`")
    file.write_text(new)
    return names
