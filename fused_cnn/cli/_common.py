"""What every command shares: its two consoles, JSON on request, options by name, and how it shows measured rows.

Standard output carries the answer alone, progress and errors go to standard error: `--json | jq` always works.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from .._backends import BACKENDS
from ..bench.errors import RequestError
from ..bench.report import tables
from ..bench.results import Result, Row, write_json
from ..bench.worker import Worker

DISAGREE = 1  # exit code: the numbers do not agree
NARROWEST = 130  # columns
DTYPES = ("float32", "bfloat16", "float16")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Networks = Annotated[list[str] | None, typer.Option(help="A torchvision network; may be given again.")]
Backend = Annotated[str, typer.Option(help="auto, reference, native or triton.")]
Seconds = Annotated[float, typer.Option(min=0, help="How long to time each row.")]
Minutes = Annotated[float, typer.Option(min=0, help="Start no row after so long; those left out are counted.")]


def out() -> Console:
    """Standard output; wide enough for the tables, also where it is a pipe or a small window."""
    console = Console()
    console.width = max(console.width, NARROWEST)
    return console


def show(headings: Iterable[str | Column], lines: Iterable[Iterable[str]], **options: Any) -> None:
    """Print a table."""
    table = Table(*headings, box=SIMPLE, **options)
    for line in lines:
        table.add_row(*line)
    out().print(table)


def say_plainly(text: str) -> None:
    """Print text as it is, such as a path, which a narrow window must not break."""
    out().print(text, highlight=False, soft_wrap=True)


def emit(document: Any) -> None:
    """Print a JSON document on standard output."""
    typer.echo(json.dumps(document, indent=2))


@contextmanager
def progress(title: str) -> Iterator[Any]:
    """A spinner with a changing text on standard error; yields a function that sets the text."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: console.print(f"{title}: {text}", highlight=False, soft_wrap=True)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title)
        yield lambda text: bar.update(task, description=f"{title}: {text}")


def take_rows(
    command: str,
    result: Result,
    jobs_of: Callable[[Worker, Callable[[str], None]], Sequence[tuple[str, Callable[[], Row]]]],
    table_of: Callable[[list[Row]], tables.Table],
    file: Path,
    minutes: float,
    json: bool,
) -> None:
    """Add a row to the result for each named job, and save it after each, so that an interrupted run keeps what it
    measured; then print the rows, as JSON or as a table. The exit code is 1 where one of them failed. None is started
    after so many minutes; `left_out` counts those that were not."""
    end = time.monotonic() + 60 * minutes
    with progress(command) as say, Worker() as worker:
        jobs = jobs_of(worker, say)
        result |= {"rows": [], "left_out": len(jobs)}
        write_json(file, result)
        for i, (name, job) in enumerate(jobs, 1):
            if time.monotonic() > end:
                break
            say(f"{i} of {len(jobs)}: {name}")
            result["rows"].append(job())
            result["left_out"] = len(jobs) - i
            write_json(file, result)
    if json:
        emit(result)
    else:
        show(*table_of(result["rows"]))
        say_plainly(f"saved: {file}")
        if result["left_out"]:
            out().print(f"{result['left_out']} of {len(jobs)} rows were left out: {minutes:g} minutes were over")
    if any("error" in row for row in result["rows"]):
        raise typer.Exit(DISAGREE)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise RequestError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    found: torch.dtype = getattr(torch, name)
    return found


def backend_of(name: str) -> str | None:
    """--backend's value as the ops take it."""
    if name not in ("auto", *BACKENDS):
        raise RequestError(f"--backend must be auto, {', '.join(BACKENDS)}, got {name!r}")
    return None if name == "auto" else name
