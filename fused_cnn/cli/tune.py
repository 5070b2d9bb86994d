"""`fused-cnn tune`: the command over fused_cnn.tuning, for torchvision's networks."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import _tables, fuse_, tuning
from .._backends import BACKENDS
from ..bench import networks
from ..bench.numbers import Autocast
from ..bench.results import write_json
from ._common import Json, device, dtype_of, emit, progress, say_plainly, show


def tune(
    model: Annotated[str, typer.Argument(help="A torchvision network.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 1,
    size: Annotated[int, typer.Option(min=32, help="Height and width of the images.")] = 224,
    train: Annotated[bool, typer.Option("--train", help="Tune training steps, by autocast in 16 bits.")] = False,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="A candidate beside PyTorch's own path; again for another. All, where none is named."),
    ] = None,
    file: Annotated[Path | None, typer.Option("--out", help="Save what was measured here, too.")] = None,
    json: Json = False,
) -> None:
    """Measure which backend and tiles are fastest for each op of a fused network whose weights are not packed;
    backend=None then uses them."""
    images = networks.photographs(batch, size).to(device())
    network = networks.network(model, images).train(train)
    candidates = tuple(dict.fromkeys(("reference", *backend))) if backend else BACKENDS
    fuse_(network)
    chosen = dtype_of(dtype)
    if not train:
        network, images = network.to(chosen), images.to(chosen)
    elif chosen != torch.float32:
        network = Autocast(network, chosen)
    with progress("tune") as say:
        measured = tuning.tune(network, images, train=train, backends=candidates, say=say)
    saved = _tables.cache_file(images.device)
    document = measured.to_json(_tables.facts(images.device))
    if file is not None:
        write_json(file, document)
    if json:
        emit({"file": str(saved), **document})
        return
    lines = []
    for key, entry in _tables.in_order(measured.choices):
        seconds = entry["seconds"]
        gain = seconds["reference"] / seconds[entry["best"]]
        # The first activation of the key, described: dtype, shape and layout.
        stored, shape, layout = re.findall(r"\('(\w+)', \(([\d, ]+)\), '(\w+)'\)", repr(key))[0]
        line = [key[0], f"{shape.replace(', ', 'x')} {stored} {layout}", entry["best"], f"{gain:.2f}x", _tried(seconds)]
        lines.append(line)
    title = f"{model}, {'training' if train else 'inference'}"
    show(["op", "input", "best", "PyTorch", "tried"], lines, title=title)
    tiles = _tables.in_order(measured.tiles)
    if tiles:
        show(
            ["kernel", "problem", "best", "tried"],
            [[kernel, str(problem), str(e["best"]), _tried(e["seconds"])] for (kernel, *problem), e in tiles],
            title=title,
        )
    say_plainly(f"saved: {saved}")


def _tried(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {s * 1e6:.0f} us" for name, s in seconds.items())
