"""`fused-cnn bench`: times every op's real cases and whole networks against eager PyTorch, and saves the
result as JSON.

Nothing is timed before its numbers are checked, unless that is left out; a row that fails the check, or whose process is lost, is reported
without a time and makes the exit code 1. Each network's row is measured in a process of its own, an op's rows in one process.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.table import Table

from . import _ceilings
from ._benches import Bench, measured, op_benches
from ._common import DISAGREE, CommandError, Json, backend_of, dtype_of, emit, out, progress, write_json
from ._network_benches import network_benches
from ._result_tables import of_limit
from ._worker import Worker
from .info import facts_of_run

MODELS = ("googlenet", "resnet50")
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16")}
BATCHES = {"cpu": (1, 8), "cuda": (32, 256, 1)}
PASSES = {"ops": (), "inference": ("inference",), "training": ("training step",), "models": ("inference", "training step")}
PASSES["all"] = PASSES["models"]


def bench(
    what: Annotated[str, typer.Argument(help="ops, models (or of these inference or training alone), or all.")] = "all",
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be given again.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A torchvision network; may be given again.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="May be given again.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="May be given again.")] = None,
    size: Annotated[int, typer.Option(min=32, help="Height and width of a network's images.")] = 224,
    backend: Annotated[str, typer.Option(help="auto, reference, native or triton.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Time torch.compile too: minutes of compilation.")] = False,
    autotune: Annotated[bool, typer.Option(help="Time torch.compile's max-autotune too: more minutes.")] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Check each row's numbers before timing it.")] = True,
    seconds: Annotated[float, typer.Option(min=0, help="How long to time each row.")] = 1.0,
    minutes: Annotated[float, typer.Option(min=0, help="Start no row after so long; those left out are counted.")] = float("inf"),
    file: Annotated[Path, typer.Option("--out", help="Where to save the JSON.")] = Path("out/bench.json"),
    json: Json = False,
) -> None:
    """Time ops and networks against eager PyTorch and its peers; save JSON that `fused-cnn report` turns into tables."""
    if what not in PASSES:
        raise CommandError(f"bench takes {', '.join(PASSES)}, got {what!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = backend_of(backend)
    dtypes = [dtype_of(name) for name in dtype or DTYPES[device]]
    batches = batch or BATCHES[device]
    compilers = [*(("compile", "fused compile") if compiled else ()), *(("autotune",) if autotune else ())]
    benches: list[Bench] = []
    if what in ("ops", "all"):
        benches += op_benches(dtypes, batches, device=device, backend=chosen, compilers=compilers, only=op or ())
    if PASSES[what] and not op:
        options: dict[str, Any] = {"device": device, "passes": PASSES[what], "backend": chosen, "compilers": compilers, "size": size}
        benches += network_benches(model or MODELS, dtypes, batches, **options)
    if not benches:
        raise CommandError(f"--op {', '.join(op or ())}: no such op; see fused_cnn.ops")
    end = time.monotonic() + 60 * minutes
    result: dict[str, Any] = {"kind": "bench", "backend": backend, "checked": check, **facts_of_run(device)}
    with progress("bench") as say, Worker() as worker:
        say("the device's ceilings: a copy, a matrix product")
        ceilings = worker.call("ceilings", _ceilings.measure, device, dtypes)
        result |= {"ceilings": ceilings.to_dict(), "rows": [], "left_out": len(benches)}
        write_json(file, result)
        for i, entry in enumerate(benches, 1):
            if time.monotonic() > end:
                break
            say(f"{i} of {len(benches)}: {entry.name}")
            result["rows"].append(measured(worker, entry, seconds, ceilings, check))
            result["left_out"] = len(benches) - i
            write_json(file, result)  # an interrupted run keeps what it measured
    failed = [row for row in result["rows"] if "error" in row]
    if json:
        emit(result)
    else:
        _show(result["rows"], file)
        if result["left_out"]:
            out().print(f"{result['left_out']} of {len(benches)} rows were left out: {minutes:g} minutes were over")
    if failed:
        raise typer.Exit(DISAGREE)


def _show(rows: list[dict[str, Any]], file: Path) -> None:
    table = Table("what", "eager", "fused", "fused is", "GB/s", "of the limit", box=SIMPLE, title="Medians of interleaved rounds")
    for row in rows:
        name = ", ".join(str(row[k]) for k in ("op", "model", "case", "batch", "dtype", "pass") if k in row)
        if "error" in row:
            table.add_row(name, "", "", f"[red]wrong: {row['error']}[/]", "", "")
            continue
        eager, fused = (f"{row['times'][v]['median'] * 1e3:.3f} ms" for v in ("eager", "fused"))
        ratio, speed = (row[k]["fused"] for k in ("ratios", "gb_per_s"))
        table.add_row(name, eager, fused, f"{ratio:.2f}x", f"{speed:.1f}", of_limit(row))
    out().print(table)
    out().print(f"saved: {file}", highlight=False, soft_wrap=True)
