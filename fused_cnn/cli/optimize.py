"""`fused-cnn optimize`: a torchvision network made ready for deployment, and its plan for each batch as a table."""

import time
from typing import Annotated, Any

import torch
import typer
from rich.table import Column

from ..bench import networks
from ..bench.facts import facts_of_run
from ..bench.numbers import Autocast, Pair, compare_scores
from ..plan.optimized import optimize as optimized_for
from ._common import DISAGREE, Backend, Json, backend_of, device, dtype_of, emit, out, progress, say_plainly, show


def optimize(
    model: Annotated[str, typer.Argument(help="A torchvision network.")],
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images in a batch; may be given again.")] = None,
    size: Annotated[int, typer.Option(min=32, help="Height and width in pixels.")] = 224,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, to compute in as by autocast.")] = "float32",
    backend: Backend = "auto",
    json: Json = False,
) -> None:
    """Make a network ready for deployment, and print the steps of its plan: what runs each, why, and what it takes."""
    chosen, torch_dtype, batches = backend_of(backend), dtype_of(dtype), batch or [1]
    computes_in = None if torch_dtype == torch.float32 else torch_dtype
    result: dict[str, Any] = {
        "kind": "optimize",
        "model": model,
        "size": size,
        "dtype": dtype,
        "backend": backend,
        **facts_of_run(device()),
        "plans": [],
    }
    with progress(model) as say:
        say("making the network and its statistics")
        each = networks.photographs(len(networks.PHOTOGRAPHS), size).to(device())
        network = networks.network(model, each)
    eager = network if computes_in is None else Autocast(network, computes_in)
    for n in batches:
        with progress(f"{model}, batch {n}") as say:
            images = networks.photographs(n, size).to(device())
            say("folding, packing, planning")
            start = time.perf_counter()
            optimized = optimized_for(network, images, dtype=computes_in, backend=chosen)
            taken = time.perf_counter() - start
            say("comparing scores with float64")
            (scores,), _ = compare_scores(Pair(eager, optimized, optimized.report), images)
            say("timing each step")
            table = optimized.table()
        result["plans"].append({"batch": n, "start": taken, "scores": scores.to_dict(), **table.to_dict()})
        if not json:
            title = f"{model}, {n} x 3 x {size} x {size}, {dtype}: started in {taken:.2f} s"
            _print(title, scores.to_dict(), *table.text(), table.notes)
    result["ok"] = all(plan["scores"]["ok"] for plan in result["plans"])
    if json:
        emit(result)
    if not result["ok"]:
        raise typer.Exit(DISAGREE)


def _print(title: str, scores: dict[str, Any], headings: list[str], body: list[list[str]], notes: list[str]) -> None:
    """One batch's plan."""
    if body:
        figures = headings.index("result") + 1
        columns = [Column(h, justify="left" if i < figures else "right") for i, h in enumerate(headings)]
        show(columns, body, title=title, padding=(0, 1, 0, 0))
    else:
        say_plainly(title)
    for note in notes:
        say_plainly(note)
    distances = "{difference:.1e} from eager, {error:.1e} from float64 (eager {eager_error:.1e}, bound {bound:.1e})"
    verdict = "[green]the numbers agree[/]" if scores["ok"] else "[red]the numbers do NOT agree[/]"
    out().print(f"{verdict}: {distances.format(**scores)}", highlight=False)
