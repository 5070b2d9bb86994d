"""`fused-cnn summary MODEL`: a network's layer table in the papers' form, and what Inception's 1x1 reductions save."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from .. import models
from ..analysis import summary as summarize
from ..bench.errors import RequestError
from ._common import Json, emit, out


def summary(
    model: Annotated[str, typer.Argument(help="A network of fused_cnn.models, such as googlenet_paper.")],
    size: Annotated[int | None, typer.Option(min=8, help="Height and width of the input.")] = None,
    json: Json = False,
) -> None:
    """Print a network's layer table: output sizes, parameters, multiply-adds."""
    try:
        network = models.build(model)
    except ValueError as error:
        raise RequestError(str(error)) from error
    channels, height, width = models.input_size(model)
    found = summarize(network, (channels, size or height, size or width), name=model)
    if json:
        emit(found.to_dict())
        return
    headings, body = found.table()
    table = Table(title=f"{model}, input {' x '.join(map(str, found.input_size))}", box=SIMPLE, padding=(0, 1))
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("name", "type") else "right")
    for row in body[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*body[-1], style="bold")
    console = out()
    console.print(table)
    for note in found.notes:
        console.print(note, highlight=False)
    if found.reductions:
        console.print(_reductions(found.reductions))


def _reductions(rows: list[dict[str, Any]]) -> Table:
    """What the 1x1 reductions save, block by block."""
    headings = [key.replace("_", " ") for key in rows[0]]
    table = Table(*headings, title="Inception blocks with their 1x1 reductions and without", box=SIMPLE)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
