"""`fused-cnn verify`: the main job. Photographs through torchvision's networks, eager and after fuse_, same weights.

For each network it prints what was fused, how far the numbers are from float64 beside eager's own distance, what each
variant takes, launches and moves, and which backend ran each op; it draws the time by stage.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..bench import networks
from ..bench.facts import facts_of_run
from ..bench.network_benches import MODELS
from ..bench.report.plots import stages
from ..bench.results import write_json
from ..bench.verify import verify_network
from ._common import DISAGREE, Backend, Json, backend_of, device, dtype_of, emit, out, progress


def verify(
    model: Annotated[list[str] | None, typer.Option(help="A torchvision network; give it again for more.")] = None,
    image: Annotated[list[str] | None, typer.Option(help="A picture file, or one of scikit-image's names.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch: Annotated[int | None, typer.Option(min=1, help="Images in a batch.", show_default="one of each")] = None,
    size: Annotated[int, typer.Option(min=32, help="Height and width in pixels.")] = 224,
    backend: Backend = "auto",
    train: Annotated[bool, typer.Option("--train", help="Also time and count a training step.")] = False,
    seconds: Annotated[float, typer.Option(min=0, help="How long to time each network.")] = 4.0,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the picture and the JSON.")] = Path("out"),
    json: Json = False,
) -> None:
    """Run photographs through torchvision's networks, eager and fused: same numbers? how much faster?"""
    chosen, torch_dtype = backend_of(backend), dtype_of(dtype)
    names = tuple(image or networks.PHOTOGRAPHS)
    images = networks.photographs(batch or len(names), size, names).to(device())
    result: dict[str, Any] = {
        "kind": "verify",
        "images": names,
        "shape": tuple(images.shape),
        "dtype": dtype,
        "backend": backend,
        **facts_of_run(device()),
        "models": {},
    }
    for name in model or MODELS:
        with progress(name) as say:
            say("making the network and its statistics")
            network = networks.network(name, images).to(torch_dtype)
            inputs = images.to(torch_dtype)
            found = verify_network(network, inputs, backend=chosen, train=train, seconds=seconds, say=say)
        result["models"][name] = found
        if not json:
            show(name, found, out())
    result["ok"] = all(found["ok"] for found in result["models"].values())
    result["picture"] = stages(result, folder / "verify.png").name  # beside the JSON
    write_json(folder / "verify.json", result)
    if json:
        emit(result)
    else:
        files = f"picture: {folder / result['picture']}\nnumbers: {folder / 'verify.json'}"
        out().print(files, highlight=False, soft_wrap=True)
        out().print("[green]the numbers agree[/]" if result["ok"] else "[red]the numbers do NOT agree[/]")
    if not result["ok"]:
        raise typer.Exit(DISAGREE)


def show(name: str, found: dict[str, Any], console: Console) -> None:
    """Print one network's tables."""
    console.rule(f"[bold]{name}")
    fused, skipped = found["fused"], found["skipped"]
    kinds = Counter(entry["module"] for entry in fused)
    counted = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    console.print(f"{len(fused)} blocks fused ({counted}), {len(skipped)} not fused", highlight=False)
    for entry in skipped:
        console.print(f"  not fused: {entry['name']} ({entry['module']}): {entry['reason']}", highlight=False)
    console.print(_numbers(found))
    top5 = found["top5"]
    shared = f"fused and eager {top5['fused_and_eager']:.0%}, eager and float64 {top5['eager_and_float64']:.0%}"
    console.print(f"top-5 classes shared: {shared}", highlight=False)
    console.print(_costs("inference", found["time"]["eval"], found["traffic"]["eval"], None))
    if "train" in found:
        train = found["train"]
        console.print(_costs("training step", train["time"], train["traffic"], train["saved_bytes"]))
    console.print(_who_ran(found))


def _numbers(found: dict[str, Any]) -> Table:
    headings = ("tensor", "fused - eager", "fused - float64", "eager - float64", "bound", "")
    table = Table(*headings, title="Largest differences", box=SIMPLE)
    training, exact = found["training"], found["training_float64"]
    shown = [
        ("scores, eval", found["scores"]),
        *((f"training step, {what}", row) for what, row in _worst(training)),
        *((f"all in float64, {what}", row) for what, row in _worst(exact)[:1]),
        *((row["name"], row) for row in [*training, *exact] if not row["ok"]),
    ]
    for label, row in shown:
        keys = ("difference", "error", "eager_error", "bound")
        figures = (f"{row[k]:.1e}" if row[k] else "" for k in keys)
        table.add_row(label, *figures, "[green]ok[/]" if row["ok"] else "[red]no[/]")
    all_of_them = f"{len(training)} tensors of a training step, all in --out's JSON"
    table.caption = f"relative to each tensor's largest value; {all_of_them}"
    return table


def _worst(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The gradient or statistic nearest to its bound, and the one with the largest difference."""
    tightest = max(rows, key=lambda r: r["error"] / r["bound"])
    largest = max(rows, key=lambda r: r["difference"])
    found = [(f"largest: {largest['name']}", largest)]
    return found if tightest is largest else [*found, (f"nearest to its bound: {tightest['name']}", tightest)]


def _costs(title: str, time: dict[str, Any], traffic: dict[str, Any], saved: dict[str, int] | None) -> Table:
    columns = ["", "time", "kernel launches", "memory traffic", *(["kept for backward"] if saved else [])]
    table = Table(*columns, box=SIMPLE, title=f"{title}: fused is {time['ratio']:.2f}x as fast as eager")
    for variant in ("eager", "fused"):
        t, c = time[variant], traffic[variant]
        row = [variant, f"{t['median'] * 1e3:.2f} ms", str(c["launches"]), f"{c['bytes'] / 1e6:.1f} MB"]
        table.add_row(*row, *([f"{saved[variant] / 1e6:.1f} MB"] if saved else []))
    table.add_row("minimum", "", "", f"{traffic['minimum']['bytes'] / 1e6:.1f} MB")
    unknown = sorted({op for v in ("eager", "fused") for op in traffic[v]["unknown"]})
    not_counted = f"; not counted: {', '.join(unknown)}" if unknown else ""
    table.caption = f"medians of {time['fused']['samples']} interleaved rounds{not_counted}"
    return table


def _who_ran(found: dict[str, Any]) -> Table:
    table = Table("pass", "backend", "op and calls", "why", title="What ran in the fused network", box=SIMPLE)
    passes = {"inference": found["backends"]["eval"]}
    if "train" in found:
        passes["training"] = found["train"]["backends"]
    for name, rows in passes.items():
        for backend, why in dict.fromkeys((row["backend"], row["why"]) for row in rows):
            ops = [f"{r['op']} x {r['calls']}" for r in rows if (r["backend"], r["why"]) == (backend, why)]
            table.add_row(name, backend, ", ".join(ops), why)
    return table
