"""Saved results: JSON files with rows, and where and with what these were measured.

Of two results for one table the later one counts; of the same device and commit they are one: row by row the later
counts, with the variants that only the earlier has.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import RequestError

KINDS = ("bench", "kernels", "verify", "tests", "load")
# What a row calls a pass, by the name of its table.
PASSES = {"inference": "inference", "training": "training step"}
TABLES = {step: table for table, step in PASSES.items()}
LABELS = (
    "op",
    "case",
    "model",
    "network",
    "clients",
    "pass",
    "dtype",
    "batch",
    "variant",
)  # what tells a row from others
OF_VARIANTS = ("times", "ratios", "gb_per_s", "tflop_per_s", "share_of_limit", "launches")
Row = dict[str, Any]
Result = dict[str, Any]


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def load_all(places: Iterable[Path]) -> list[Result]:
    """Every result in files and folders; a stage of scripts/gpu.sh may have none."""
    files = [f for place in places for f in (sorted(place.rglob("*.json")) if place.is_dir() else [place])]
    if not files:
        where = ", ".join(map(str, places))
        raise RequestError(f"no results in {where}: `fused-cnn bench` and `fused-cnn verify` make some")
    return [result for file in files if (result := load(file)) is not None]


def load(file: Path) -> Result | None:
    """A saved result of one of KINDS; a stage of scripts/gpu.sh and pytest-benchmark's file have one in them."""
    try:
        document = json.loads(file.read_text())
        if "stage" in document:
            document = {} if document["dry"] else document.get("result") or {}
            return document if document.get("kind") in KINDS else None
        if "choices" in document:  # what `fused-cnn tune` measured
            return None
        document = document.get("fused_cnn", document)  # pytest-benchmark's file, as benchmarks/conftest.py adds to it
        if document["kind"] not in KINDS:
            raise KeyError(document["kind"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        kinds = "verify, bench, profile, pytest-benchmark, examples/load.py or scripts/gpu.sh"
        raise RequestError(f"{file} is not a result of {kinds}: {error!r}") from error
    return document


def newest(results: Iterable[Result]) -> list[Result]:
    """The latest result for each table and kind of device, with that table's rows alone; `table` names it."""
    found: dict[tuple[str, str], Result] = {}
    for result in sorted(results, key=lambda r: r["date"]):
        for table, rows in _by_table(result).items():
            before = found.get((table, result["device"]), {})
            one = all(before.get(fact) == result.get(fact) for fact in ("device_name", "commit"))
            rows = merged(before.get("rows", []) if one else [], rows)  # a result may have a row twice, too
            found[table, result["device"]] = {**result, "table": table, "rows": rows}
    return list(found.values())


def table_of(row: Row) -> str:
    """The table of a row of `bench`."""
    return TABLES.get(row["pass"], "ops")


def _by_table(result: Result) -> dict[str, list[Row]]:
    rows: list[Row] = result.get("rows", [])
    if table := {"verify": "verify", "kernels": "steps", "load": "load"}.get(result["kind"]):
        return {table: rows}
    return {table: [row for row in rows if table_of(row) == table] for table in dict.fromkeys(map(table_of, rows))}


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Two results' rows. Of one that both have the later counts, with the variants that only the earlier has."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(label) for label in LABELS)

    rows = {key(row): row for row in old}
    for row in new:
        before = rows.get(key(row), {})
        if "times" in row and "times" in before:
            absent = row.get("absent", {})
            kept = {field: {v: x for v, x in before.get(field, {}).items() if v not in absent} for field in OF_VARIANTS}
            row = {**row, **{field: of | row.get(field, {}) for field, of in kept.items()}}
        rows[key(row)] = row
    return list(rows.values())
