"""`fused-cnn report [FILE | FOLDER]...`: turns saved results (verify, bench, profile, pytest-benchmark, scripts/gpu.sh) into Markdown
tables and PNG plots.

`--update README.md` rewrites the text between `<!-- table:NAME -->` and `<!-- /table -->`. Tables are named verify, inference, training,
memory-inference, memory-training, ops, steps and kernels-MODEL-PASS, with `-cuda` added where a GPU made them, headlines, and `ran`: which
kernels have run on which GPU. Of two results for one table the later one counts; of the same device and commit they are one: row by row the
later counts, with the variants that only the earlier has.
"""

from __future__ import annotations

import json as json_module
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _kernel_tables, _ran, _result_tables
from ._common import CommandError, Json, emit, out
from ._result_tables import markdown, source

RESULTS = Path("benchmarks/results")
KINDS = ("bench", "kernels", "verify", "tests")
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
    """A saved result of one of KINDS; a stage of scripts/gpu.sh and pytest-benchmark's file have one in them."""
    try:
        document = json_module.loads(file.read_text())
        if "stage" in document:
            document = {} if document["dry"] else document.get("result") or {}
            return document if document.get("kind") in KINDS else None
        if "choices" in document:  # what `fused-cnn tune` measured
            return None
        document = document.get("fused_cnn", document)  # pytest-benchmark's file, of which benchmarks/conftest.py has a part
        if document["kind"] not in KINDS:
            raise KeyError(document["kind"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CommandError(f"{file} is not a result of verify, bench, profile, pytest-benchmark or scripts/gpu.sh: {error!r}") from error
    found: dict[str, Any] = document
    return found


TABLES = {"op": "ops", "inference": "inference", "training step": "training"}  # of `bench`, by what a row is
ROW = ("op", "case", "model", "pass", "dtype", "batch", "variant")  # what tells it from others
OF_VARIANTS = ("times", "ratios", "gb_per_s", "tflop_per_s", "share_of_limit", "launches")
Rows = list[dict[str, Any]]


def newest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The latest result for each table and kind of device, with that table's rows alone; `table` names it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for result in sorted(results, key=lambda r: r["date"]):
        for table, rows in _by_table(result).items():
            before = found.get((table, result["device"]), {})
            if all(before.get(fact) == result.get(fact) for fact in ("device_name", "commit")):
                rows = merged(before.get("rows", []), rows)
            found[table, result["device"]] = {**result, "table": table, "rows": rows}
    return list(found.values())


def _by_table(result: dict[str, Any]) -> dict[str, Rows]:
    if result["kind"] in ("verify", "kernels"):
        return {{"kernels": "steps"}.get(result["kind"], result["kind"]): result.get("rows", [])}
    tables: dict[str, Rows] = {}
    for row in result.get("rows", ()):
        tables.setdefault(TABLES[row["kind"] if row["kind"] == "op" else row["pass"]], []).append(row)
    return tables


def merged(old: Rows, new: Rows) -> Rows:
    """Two results' rows. Of one that both have the later counts, with the variants that only the earlier has."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(label) for label in ROW)

    rows = {key(row): row for row in old}
    for row in new:
        before = rows.get(key(row), {})
        if "times" in row and "times" in before:
            absent = row.get("absent", {})
            kept = {field: {v: x for v, x in before.get(field, {}).items() if v not in absent} for field in OF_VARIANTS}
            row = {**row, **{field: of | row.get(field, {}) for field, of in kept.items()}}
        rows[key(row)] = row
    return list(rows.values())


def tables_of(results: list[dict[str, Any]]) -> dict[str, str]:
    """Every table that results have, by name."""
    found = {}
    latest = newest(results)
    for result in latest:
        suffix = "-cuda" if result["device"] == "cuda" else ""
        name, rows = result["table"], result["rows"]
        if result["kind"] == "verify":
            found[name + suffix] = markdown(*_result_tables.verify(result)) + source(result)
        elif result["kind"] == "kernels":
            found[name + suffix] = markdown(*_kernel_tables.steps(rows)) + source(result)
            for of in dict.fromkeys(map(_kernel_tables.name, rows)):
                found[of + suffix] = markdown(*_kernel_tables.kernels([row for row in rows if _kernel_tables.name(row) == of]))
        else:
            subject = rows[0]["kind"]
            below = _result_tables.losses(rows) + _result_tables.absences(rows) + source(result)
            found[name + suffix] = markdown(*_result_tables.bench(rows, subject)) + below
            if subject == "model":
                found[f"memory-{name}{suffix}"] = markdown(*_result_tables.memory(rows))
    for device, suffix in (("cpu", ""), ("cuda", "-cuda")):
        networks = [r for r in latest if r["device"] == device and r["table"] in ("inference", "training", "steps")]
        found[f"headlines{suffix}"] = _result_tables.headlines(networks)
    found["ran"] = markdown(*_ran.table(results))
    return found


def _plots(result: dict[str, Any], folder: Path) -> list[Path]:
    from . import _picture

    suffix = "-cuda" if result["device"] == "cuda" else ""
    table = result["table"]
    if table == "verify":
        return [_picture.stages(result, folder / f"verify{suffix}.png")]
    if table == "steps":
        return []
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
