"""`fused-cnn bench`: times every op's real cases and whole networks against eager PyTorch, and saves JSON.

Nothing is timed before its numbers are checked, unless that is left out; a row that fails the check, or whose process
is lost, is reported without a time and makes the exit code 1.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench import ceilings
from ..bench.benches import BATCHES, DTYPES, Bench, measured, op_benches
from ..bench.errors import RequestError
from ..bench.facts import facts_of_run
from ..bench.network_benches import DEPLOYED, MODELS, network_benches
from ..bench.report import tables
from ..bench.results import PASSES, Result, Row
from ..bench.worker import Worker
from ._common import Backend, Json, Minutes, Networks, Seconds, backend_of, device, dtype_of, take_rows

# The networks' passes that are timed for what is asked for.
STEPS = {"ops": (), **{name: (step,) for name, step in PASSES.items()}}
STEPS |= dict.fromkeys(("models", "all"), tuple(PASSES.values()))


def bench(
    what: Annotated[str, typer.Argument(help="ops, models (or of these inference or training alone), or all.")] = "all",
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be given again.")] = None,
    model: Networks = None,
    dtype: Annotated[list[str] | None, typer.Option(help="May be given again.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="May be given again.")] = None,
    size: Annotated[int, typer.Option(min=32, help="Height and width of a network's images.")] = 224,
    backend: Backend = "auto",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Time torch.compile and, on a CPU, AOTInductor's package too: it takes minutes."
        ),
    ] = False,
    reduce_overhead: Annotated[
        bool, typer.Option("--reduce-overhead", help="Time torch.compile's reduce-overhead, a GPU's CUDA graphs, too.")
    ] = False,
    autotune: Annotated[bool, typer.Option(help="Time torch.compile's max-autotune too: more minutes.")] = False,
    check: Annotated[bool, typer.Option(help="Check each row's numbers before timing it.")] = True,
    seconds: Seconds = 1.0,
    minutes: Minutes = float("inf"),
    file: Annotated[Path, typer.Option("--out", help="Where to save the JSON.")] = Path("out/bench.json"),
    json: Json = False,
) -> None:
    """Time ops and networks against eager PyTorch and its peers; save JSON that `fused-cnn report` turns into
    tables."""
    if what not in STEPS:
        raise RequestError(f"bench takes {', '.join(STEPS)}, got {what!r}")
    here = device()
    dtypes = [dtype_of(name) for name in dtype] if dtype else DTYPES[here]
    batches = batch or BATCHES[here]
    asked = {"compile": compiled, "fused compile": compiled, "reduce-overhead": reduce_overhead, "autotune": autotune}
    # A package is of a CPU's plan; on a GPU, which is paid by the hour, one compilation of the fused network is enough.
    asked |= dict.fromkeys(DEPLOYED, compiled and here == "cpu")
    compilers = tuple(name for name, wanted in asked.items() if wanted)
    options: dict[str, Any] = {"device": here, "backend": backend_of(backend), "compilers": compilers}
    benches: list[Bench] = []
    if what in ("ops", "all"):
        benches += op_benches(dtypes, batches, only=op or (), **options)
    if not op:
        benches += network_benches(model or MODELS, dtypes, batches, passes=STEPS[what], size=size, **options)
    if not benches:
        raise RequestError(f"--op {', '.join(op or ())}: no such op; see fused_cnn.ops")
    result: Result = {"kind": "bench", "backend": backend, "checked": check, **facts_of_run(here)}

    def jobs(worker: Worker, say: Callable[[str], None]) -> list[tuple[str, Callable[[], Row]]]:
        say("the device's ceilings: a copy, a matrix product")
        limits = worker.call(benches[0].room, ceilings.measure, here, dtypes)  # a process more takes seconds to start
        result["ceilings"] = asdict(limits)
        return [(each.name, partial(measured, worker, each, seconds, limits, check)) for each in benches]

    take_rows("bench", result, jobs, _table, file, minutes, json)


def _table(rows: list[Row]) -> tables.Table:
    labels = [k for k in ("op", "model", "case", "batch", "dtype", "pass") if any(k in row for row in rows)]
    figures = {name: tables.FIGURES[name] for name in ("fused / eager", "GB/s", "of the limit")}
    shown = [v for v in tables.variants_in(rows) if v in ("eager", "fused", "optimized")]
    return tables.table(rows, labels, {**tables.medians(shown), **figures})
