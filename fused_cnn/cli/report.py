"""`fused-cnn report`: turns results (verify, bench, profile, pytest-benchmark, scripts/gpu.sh) into tables and plots.

`--update README.md` rewrites the text between `<!-- table:NAME -->` and `<!-- /table -->`.
"""

from pathlib import Path
from typing import Annotated

import typer

from ..bench.report import draw, rewrite, tables_of
from ..bench.results import load_all, newest
from ._common import Json, emit


def report(
    places: Annotated[list[Path] | None, typer.Argument(help="JSON files or folders of them.")] = None,
    update: Annotated[list[Path] | None, typer.Option(help="Rewrite a page's marked tables; may be repeated.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for PNG plots; none without it.")] = None,
    json: Json = False,
) -> None:
    """Make Markdown tables, and with --out plots, from saved results; those in benchmarks/results where none are
    named."""
    results = load_all(places or [Path("benchmarks/results")])
    tables = tables_of(results)
    plots = [str(path) for result in newest(results) for path in draw(result, folder)] if folder else []
    updated = {str(file): rewrite(file, tables) for file in update or ()}
    if json:
        emit({"tables": tables, "plots": plots, "updated": updated})
        return
    for name, text in tables.items() if not update else ():
        print(f"## {name}\n\n{text}")
    for path in plots:
        print(f"plot: {path}")
    for file, names in updated.items():
        print(f"{file}: {', '.join(names)}")
