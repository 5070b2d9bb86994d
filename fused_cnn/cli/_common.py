"""What every command shares: its two consoles, JSON on request, and an error that ends the program in one
line.

Standard output carries the answer and nothing else; progress and errors go to standard error, so that
`--json | jq` always works.
"""

from __future__ import annotations

import importlib
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .._backends import BACKENDS

DISAGREE = 1  # the numbers do not agree
NARROWEST = 130  # columns
USAGE = 2  # what was asked for cannot be done: a wrong option, a missing package, an unavailable backend

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CommandError(Exception):
    """Ends the command with one line on standard error and an exit code."""

    def __init__(self, message: str, exit_code: int = USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def out() -> Console:
    """Standard output; wide enough for the tables, also where it is a pipe or a small window."""
    console = Console()
    console.width = max(console.width, NARROWEST)
    return console


def err() -> Console:
    return Console(stderr=True)


def emit(document: Any) -> None:
    """Print a JSON document on standard output."""
    typer.echo(json.dumps(document, indent=2))


@contextmanager
def progress(title: str) -> Iterator[Any]:
    """A spinner with a changing text on standard error; yields a function that sets the text."""
    console = err()
    if not console.is_terminal:

        def say(text: str) -> None:
            console.print(f"{title}: {text}", highlight=False, soft_wrap=True)

        yield say
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title)
        yield lambda text: bar.update(task, description=f"{title}: {text}")


def require(module: str, install: str) -> ModuleType:
    """Import a package that only this command needs; a missing one is a one-line error that says how to get
    it.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # torchvision beside another build of torch raises RuntimeError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"this command needs {module.partition('.')[0]}: {reason}; {install}") from error


def dtype_of(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise CommandError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def backend_of(name: str) -> str | None:
    """--backend's value as the ops take it."""
    if name not in ("auto", *BACKENDS):
        raise CommandError(f"--backend must be auto, {', '.join(BACKENDS)}, got {name!r}")
    return None if name == "auto" else name


def commit() -> str:
    """The commit of the source tree that this package runs from; "" where it is not a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
