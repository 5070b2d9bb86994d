"""`fused-cnn summary MODEL`: a network's layer table in the papers' form, and what Inception's 1x1 reductions save."""

from typing import Annotated

import typer
from rich.table import Column

from .. import models
from ..analysis import summary as summarize
from ..bench.errors import RequestError
from ._common import Json, emit, out, show


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
    columns = [
        Column(heading, total, footer_style="bold", no_wrap=True, justify="left" if i < 2 else "right")
        for i, (heading, total) in enumerate(zip(headings, body[-1], strict=True))  # a name and a type, then figures
    ]
    title = f"{model}, input {' x '.join(map(str, found.input_size))}"
    show(columns, body[:-1], title=title, show_footer=True, padding=(0, 1))
    for note in found.notes:
        out().print(note, highlight=False)
    if found.reductions:
        headings = [key.replace("_", " ") for key in found.reductions[0]]
        lines = [[v if isinstance(v, str) else f"{v:,}" for v in row.values()] for row in found.reductions]
        show(headings, lines, title="Inception blocks with their 1x1 reductions and without")
