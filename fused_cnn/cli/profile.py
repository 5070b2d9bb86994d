"""`fused-cnn profile`: which kernels keep the device busy in a network's step, how long it waits, and with --host which
Python functions the host is in. Nothing is checked here; `fused-cnn bench` and `verify` do that.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.benches import BATCHES, DTYPES
from ..bench.errors import RequestError
from ..bench.facts import facts_of_run
from ..bench.network_benches import MODELS, NetworkBench
from ..bench.peers import COMPILERS
from ..bench.report.tables import steps
from ..bench.results import PASSES, Result, Row
from ..bench.worker import Worker
from ._common import Json, Minutes, Networks, Seconds, device, dtype_of, take_rows

VARIANTS = ("eager", "fused", "compile", "fused compile")


def profile(
    model: Networks = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images a step.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or, to train by autocast, bfloat16 or float16.")] = None,
    passes: Annotated[list[str] | None, typer.Option("--pass", help="inference or training; may be repeated.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help=f"{', '.join(VARIANTS)}; may be given again.")] = None,
    host: Annotated[bool, typer.Option("--host", help="Profile the host's Python, too.")] = False,
    size: Annotated[int, typer.Option(min=32, help="Height and width of the images.")] = 224,
    seconds: Seconds = 1.0,
    minutes: Minutes = float("inf"),
    file: Annotated[Path, typer.Option("--out", help="Where to save the JSON.")] = Path("out/kernels.json"),
    json: Json = False,
) -> None:
    """List the kernels of networks' steps, eager, fused and compiled; save JSON that `fused-cnn report` turns into
    tables."""
    chosen = dtype_of(dtype) if dtype else DTYPES[device()][0]
    for given, known, option in ((passes, PASSES, "--pass"), (variant, VARIANTS, "--variant")):
        if unknown := [name for name in given or () if name not in known]:
            raise RequestError(f"{option} must be one of {', '.join(known)}, got {unknown[0]!r}")
    images = batch or max(BATCHES[device()])
    of: dict[str, Any] = {"size": size, "dtype": chosen, "device": device()}
    wanted = [
        (NetworkBench(model=name, batch=images, direction=PASSES[which], **of), each)
        for name in model or MODELS
        for which in passes or PASSES
        for each in variant or VARIANTS
    ]
    wanted.sort(key=lambda job: job[1] in COMPILERS)  # what takes minutes to compile comes last
    result: Result = {"kind": "kernels", **facts_of_run(device())}

    def jobs(worker: Worker, _: Any) -> list[tuple[str, Callable[[], Row]]]:
        return [
            (
                f"{of.name} {each}",
                partial(worker.row, {**of.labels, "variant": each}, of.model, of.profile, each, seconds, host),
            )
            for of, each in wanted
        ]

    take_rows("profile", result, jobs, partial(steps, longest=_longest), file, minutes, json)


def _longest(row: Row) -> str:
    kernel, _, microseconds = row["kernels"][0]
    return f"{microseconds / 1e3:.2f} ms {kernel[:40]}"
