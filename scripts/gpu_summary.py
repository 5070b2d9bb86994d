"""What a run of scripts/gpu.sh showed, in at most 80 lines: what failed, by name, and where the time goes."""

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_runner import Outcome, read_json

WIDTH = 140
MOST_NAMED = 200  # failed tests in the JSON
VARIANTS = ("eager", "graph", "compile", "fused", "optimized", "fused graph", "fused compile")
BACKENDS = ("eager", "fused", "native", "triton", "library")
NOISE = re.compile(r"^void |\(anonymous namespace\)::|at::native::|fused_cnn::")  # of kernels' names
Rows = Sequence[Mapping[str, Any]]


def tests(outcomes: Path) -> dict[str, Any]:
    """Counts, what failed, and the slowest, of the lines that tests have left so far."""
    found = []
    if outcomes.exists():
        found = [json.loads(line) for line in outcomes.read_text().splitlines() if line.endswith("}")]
    failed = [test for test in found if test["outcome"] == "failed"]
    return {
        **Counter(test["outcome"] for test in found),
        "failures": [{"test": test["test"], "message": test["message"]} for test in failed[:MOST_NAMED]],
        "slowest": [
            {"test": t["test"], "seconds": t["seconds"]} for t in sorted(found, key=lambda t: -t["seconds"])[:20]
        ],
    }


def summary(outcomes: Sequence[Outcome], found_tests: Mapping[str, Any], outdir: Path) -> list[str]:
    """The lines; results are read from the folder. Each part has a number of lines that it may have at most."""
    results = {name: _result(outdir / f"{name}.json") for name in ("networks", "ops", "kernels")}
    parts = (
        (18, _pieces(outcomes)),
        (12, _failed_tests(found_tests)),
        (8, [*_rows_without(results), *_left_out(outdir, results)]),
        (12, _networks(results["networks"])),
        (16, _kernels(results["kernels"])),
        (4, _host(results["kernels"])),
        (10, _ops(results["ops"])),
    )
    return [line[:WIDTH] for most, lines in parts for line in _at_most(most, list(lines))]


def _result(path: Path) -> Rows:
    document = read_json(path) or {}
    rows: Rows = (document.get("result") or document).get("rows", ())
    return rows


def _at_most(most: int, lines: Sequence[str]) -> Sequence[str]:
    return (
        lines
        if len(lines) <= most
        else [*lines[: most - 1], f"... and {len(lines) - most + 1} lines more, in the files"]
    )


def _pieces(outcomes: Sequence[Outcome]) -> Iterator[str]:
    green = ", ".join(f"{outcome.name} {outcome.seconds:.0f} s" for outcome in outcomes if outcome.state == "ok")
    yield from textwrap.wrap(f"whole and green: {green or 'nothing'}", WIDTH, subsequent_indent="   ")
    left_out = [outcome for outcome in outcomes if outcome.state == "left out"]
    for why in dict.fromkeys(outcome.why for outcome in left_out):
        names = ", ".join(outcome.name for outcome in left_out if outcome.why == why)
        yield from textwrap.wrap(f"left out, {why}: {names}", WIDTH, subsequent_indent="   ")
    for outcome in outcomes:
        if outcome.state in ("failed", "stopped"):
            yield f"{outcome.state.upper()}: {outcome.name}, {outcome.why}"
            yield from (f"   {line}" for line in outcome.said)


def _failed_tests(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each test function that failed: how often, and the first time how."""
    if any(found.get(outcome) for outcome in ("passed", "failed", "skipped")):
        yield "tests: " + ", ".join(f"{found.get(outcome, 0)} {outcome}" for outcome in ("passed", "failed", "skipped"))
    functions: dict[str, list[Mapping[str, str]]] = {}
    for failure in found["failures"]:
        functions.setdefault(failure["test"].partition("[")[0], []).append(failure)
    for function, failures in sorted(functions.items(), key=lambda item: -len(item[1])):
        case = failures[0]["test"][len(function) :]
        yield f"FAILED {len(failures)}x {function.removeprefix('tests/')}{case[:60]}: {failures[0]['message']}"


def _rows_without(results: Mapping[str, Rows]) -> Iterator[str]:
    """Rows that failed, and peers that are missing in one."""
    for result, rows in results.items():
        for row in rows:
            if "error" in row:
                yield f"FAILED {result}, {_name(row)}: {row['error']}"
            for peer, why in row.get("absent", {}).items():
                yield f"ABSENT {result}, {_name(row)}: {peer}: {why}"


def _left_out(outdir: Path, names: Iterable[str]) -> Iterator[str]:
    """Rows that there was no time for."""
    for name in names:
        document = read_json(outdir / f"{name}.json") or {}
        missing = (document.get("result") or document).get("left_out")
        if missing:
            yield f"LEFT OUT {name}: {missing} rows, for want of time"


def _name(row: Mapping[str, Any]) -> str:
    return " ".join(str(row[key]) for key in ("op", "model", "case", "batch", "pass", "variant") if key in row)


def _networks(rows: Rows) -> Iterator[str]:
    timed = [row for row in rows if "times" in row]
    if timed:
        yield f"{'ms a step':28}" + "".join(f"{variant:>14}" for variant in (*VARIANTS, "limit"))
    for row in timed:
        seconds = [row["times"].get(variant, {}).get("median") for variant in VARIANTS]
        yield f"{_name(row):28}" + "".join(f"{s * 1e3:14.2f}" if s else f"{'-':>14}" for s in (*seconds, row["limit"]))


def _kernels(rows: Rows) -> Iterator[str]:
    """The longest kernels of what we run and of what torch.compile makes."""
    for row in rows:
        if row["variant"] in ("fused", "compile") and "host" not in row and row.get("kernels"):
            yield f"{_name(row)}: {row['ms']:.2f} ms, busy {row['busy_ms']:.2f} ms in {row['launches']} launches:"
            yield "   " + "; ".join(
                f"{us / 1e3:.2f} ms {n}x {NOISE.sub('', name)[:32]}" for name, n, us in row["kernels"][:3]
            )


def _host(rows: Rows) -> Iterator[str]:
    """The Python functions that take longest where the host is the limit."""
    for row in rows:
        if row["variant"] == "fused" and row.get("host"):
            own = "; ".join(
                f"{seconds * 1e3:.2f} ms {where.rpartition('/')[2][:60]}" for where, _, seconds in row["host"][:2]
            )
            yield f"host, {_name(row)}: {row['ms']:.2f} ms, of these {own}"


def _ops(rows: Rows) -> Iterator[str]:
    """The ops that lose the most time against their limit."""
    timed = sorted(
        (row for row in rows if "times" in row), key=lambda row: row["limit"] - row["times"]["fused"]["median"]
    )
    if timed:
        yield f"{'slowest ops, us':60}" + "".join(f"{name:>10}" for name in ("limit", *BACKENDS))
    for row in timed[:9]:
        seconds = [row["limit"], *(row["times"].get(name, {}).get("median") for name in BACKENDS)]
        yield f"{_name(row)[:60]:60}" + "".join(f"{s * 1e6:10.0f}" if s else f"{'-':>10}" for s in seconds)
