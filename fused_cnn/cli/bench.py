"""`fused-cnn bench`: times every op's real cases and whole networks against eager PyTorch, and saves the
result as JSON.

Nothing is timed before its numbers are checked; one that fails the check is reported without a time and
makes the exit code 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.table import Table

from .. import _backends
from ._benches import Bench, model_benches, op_benches
from ._common import DISAGREE, CommandError, Json, backend_of, dtype_of, emit, out, progress, write_json
from .info import facts_of_run

MODELS = ("googlenet", "resnet50")
DTYPES = ("float32", "bfloat16")
BATCHES = (1, 8)


def bench(
    what: Annotated[str, typer.Argument(help="ops, models or all.")] = "all",
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be given again.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A torchvision network; may be given again.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="May be given again.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="May be given again.")] = None,
    size: Annotated[int, typer.Option(min=32, help="Height and width of a network's images.")] = 224,
    backend: Annotated[str, typer.Option(help="auto, reference, native or triton.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Time torch.compile too: minutes of compilation.")] = False,
    seconds: Annotated[float, typer.Option(min=0, help="How long to time each row.")] = 1.0,
    file: Annotated[Path, typer.Option("--out", help="Where to save the JSON.")] = Path("out/bench.json"),
    json: Json = False,
) -> None:
    """Time ops and networks against eager PyTorch; save JSON that `fused-cnn report` turns into tables."""
    if what not in ("ops", "models", "all"):
        raise CommandError(f"bench takes ops, models or all, got {what!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = backend_of(backend)
    dtypes = [dtype_of(name) for name in dtype or DTYPES]
    batches = batch or BATCHES
    benches: list[Bench] = []
    if what != "models":
        ops = op_benches(dtypes, device=device, batch=min(batches), backend=chosen, compiled=compiled, only=op or ())
        benches += ops
    if what != "ops" and not op:
        names = model or MODELS
        benches += model_benches(names, dtypes, batches, device=device, backend=chosen, compiled=compiled, size=size)
    if not benches:
        raise CommandError(f"--op {', '.join(op or ())}: no such op; see fused_cnn.ops")
    result: dict[str, Any] = {"kind": "bench", "backend": backend, **facts_of_run(device), "rows": []}
    with progress("bench") as say:
        for i, entry in enumerate(benches, 1):
            say(f"{i} of {len(benches)}: {entry.name}")
            result["rows"].append(_measured(entry, seconds))
            write_json(file, result)  # an interrupted run keeps what it measured
    failed = [row for row in result["rows"] if "error" in row]
    if json:
        emit(result)
    else:
        _show(result["rows"], file)
    if failed:
        raise typer.Exit(DISAGREE)


def _measured(entry: Bench, seconds: float) -> dict[str, Any]:
    try:
        return entry.run(seconds)
    except (AssertionError, _backends.BackendUnavailable) as error:
        return {"kind": entry.kind, **entry.labels, "error": " ".join(str(error).split())}


def _show(rows: list[dict[str, Any]], file: Path) -> None:
    table = Table("what", "eager", "fused", "fused is", "GB/s", box=SIMPLE, title="Medians of interleaved rounds")
    for row in rows:
        name = ", ".join(str(row[k]) for k in ("op", "model", "case", "batch", "dtype", "pass") if k in row)
        if "error" in row:
            table.add_row(name, "", "", f"[red]wrong: {row['error']}[/]", "")
            continue
        eager, fused = (f"{row['times'][v]['median'] * 1e3:.3f} ms" for v in ("eager", "fused"))
        table.add_row(name, eager, fused, f"{row['ratios']['fused']:.2f}x", f"{row['gb_per_s']['fused']:.1f}")
    out().print(table)
    out().print(f"saved: {file}", highlight=False, soft_wrap=True)
