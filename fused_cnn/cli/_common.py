"""What every command shares: its two consoles, JSON on request, options by name, and how it shows measured rows.

Standard output carries the answer alone, progress and errors go to standard error: `--json | jq` always works.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .._backends import BACKENDS
from ..bench.errors import RequestError
from ..bench.results import Result

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


def show_rows(result: Result, table: Table, file: Path, minutes: float, json: bool) -> None:
    """Print measured rows, as JSON or as a table; the exit code is 1 where one of them failed."""
    rows, left_out = result["rows"], result["left_out"]
    if json:
        emit(result)
    else:
        out().print(table)
        out().print(f"saved: {file}", highlight=False, soft_wrap=True)
        if left_out:
            out().print(f"{left_out} of {len(rows) + left_out} rows were left out: {minutes:g} minutes were over")
    if any("error" in row for row in rows):
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
