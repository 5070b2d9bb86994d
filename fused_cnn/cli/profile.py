"""`fused-cnn profile`: where a network's step spends its time: which kernels keep the device busy and for how long, how long the device
waits, and with --host which Python functions the host is in. Nothing is checked here; `fused-cnn bench` and `verify` do that.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.table import Table

from ..measure import Interleaved, synchronize
from . import _kernels
from ._common import DISAGREE, CommandError, Json, dtype_of, emit, out, progress, write_json
from ._network_benches import NetworkBench
from ._peers import COMPILERS
from ._worker import Worker, WorkFailed
from .bench import BATCHES, DTYPES, MODELS
from .info import facts_of_run

PASSES = {"inference": "inference", "training": "training step"}
VARIANTS = ("eager", "fused", "compile", "fused compile")
MOST = 45  # kernels of a row


def profile(
    model: Annotated[list[str] | None, typer.Option(help="A torchvision network; may be given again.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images a step.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; training in 16 bits is float32 under autocast.")] = None,
    passes: Annotated[list[str] | None, typer.Option("--pass", help="inference or training; may be given again.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help=f"{', '.join(VARIANTS)}; may be given again.")] = None,
    host: Annotated[bool, typer.Option("--host", help="Profile the host's Python, too.")] = False,
    size: Annotated[int, typer.Option(min=32, help="Height and width of the images.")] = 224,
    seconds: Annotated[float, typer.Option(min=0, help="How long to time each row.")] = 1.0,
    minutes: Annotated[float, typer.Option(min=0, help="Start no row after so long; those left out are counted.")] = float("inf"),
    file: Annotated[Path, typer.Option("--out", help="Where to save the JSON.")] = Path("out/kernels.json"),
    json: Json = False,
) -> None:
    """List the kernels of networks' steps, eager, fused and compiled; save JSON that `fused-cnn report` turns into tables."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = dtype_of(dtype or DTYPES[device][0])
    for given, known, option in ((passes, PASSES, "--pass"), (variant, VARIANTS, "--variant")):
        if unknown := [name for name in given or () if name not in known]:
            raise CommandError(f"{option} must be one of {', '.join(known)}, got {unknown[0]!r}")
    jobs = [
        (NetworkBench(chosen, device, None, (), name, batch or max(BATCHES[device]), PASSES[which], size), each)
        for name in model or MODELS
        for which in passes or PASSES
        for each in variant or VARIANTS
    ]
    jobs.sort(key=lambda job: job[1] in COMPILERS)  # what takes minutes to compile comes last
    end = time.monotonic() + 60 * minutes
    result: dict[str, Any] = {"kind": "kernels", **facts_of_run(device), "rows": [], "left_out": len(jobs)}
    write_json(file, result)
    with progress("profile") as say, Worker() as worker:
        for i, (bench, each) in enumerate(jobs, 1):
            if time.monotonic() > end:
                break
            say(f"{i} of {len(jobs)}: {bench.name} {each}")
            row = {**bench.labels, "variant": each}
            try:
                row |= worker.call(bench.model, profiled, bench, each, seconds, host)
            except WorkFailed as error:
                row["error"] = str(error)
            result["rows"].append(row)
            result["left_out"] = len(jobs) - i
            write_json(file, result)  # an interrupted run keeps what it measured
    if json:
        emit(result)
    else:
        _show(result["rows"], file)
        if result["left_out"]:
            out().print(f"{result['left_out']} of {len(jobs)} rows were left out: {minutes:g} minutes were over")
    if any("error" in row for row in result["rows"]):
        raise typer.Exit(DISAGREE)


def profiled(bench: NetworkBench, variant: str, seconds: float, with_host: bool) -> dict[str, Any]:
    """One row: milliseconds a step, how long of these the device was busy and with how many launches, and its kernels. `peak` is the
    most bytes that were allocated on a GPU during a step, weights and images among them."""
    torch.compiler.reset()  # forgets the row before
    work = bench.variant(variant)
    gc.collect()  # the other variant's network
    row: dict[str, Any] = {"ms": Interleaved({variant: work}, bench.device).run(seconds)[variant].median * 1e3, "peak": None}
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        synchronize(bench.device)
        row["peak"] = torch.cuda.max_memory_allocated()
    kernels = _kernels.kernels(work, bench.device)
    row["busy_ms"] = sum(microseconds for *_, microseconds in kernels) / 1e3
    row["launches"] = sum(launches for _, launches, _ in kernels)
    row["kernels"] = [list(kernel) for kernel in kernels[:MOST]]
    if with_host:
        row["host"] = _kernels.host(work, bench.device)
    return row


def _show(rows: list[dict[str, Any]], file: Path) -> None:
    table = Table("what", "variant", "ms a step", "images/s", "busy ms", "launches", "longest", box=SIMPLE)
    for row in rows:
        name = ", ".join(str(row[k]) for k in ("model", "pass", "dtype", "batch"))
        if "error" in row:
            table.add_row(name, row["variant"], "", "", "", "", f"[red]{row['error']}[/]")
            continue
        longest, _, taken = row["kernels"][0]
        figures = (f"{row['ms']:.2f}", f"{row['batch'] / row['ms'] * 1e3:.0f}", f"{row['busy_ms']:.2f}", str(row["launches"]))
        table.add_row(name, row["variant"], *figures, f"{taken / 1e3:.2f} ms {longest[:40]}")
    out().print(table)
    out().print(f"saved: {file}", highlight=False, soft_wrap=True)
