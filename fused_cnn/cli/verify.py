"""`fused-cnn verify`: the main job. Photographs through torchvision's networks, eager, after fuse_ and after optimize,
same weights.

For each network it prints what was fused, how far the numbers are from float64 beside eager's own distance, what each
variant takes, launches and moves, and which backend ran each op; it draws the time by stage.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench import networks
from ..bench.facts import facts_of_run
from ..bench.network_benches import MODELS
from ..bench.report.plots import stages
from ..bench.results import write_json
from ..bench.verify import verify_network
from ._common import DISAGREE, Backend, Json, backend_of, device, dtype_of, emit, out, progress, say_plainly, show


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
    """Run photographs through torchvision's networks, eager, fused and optimized: same numbers? how much faster?"""
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
            _print(name, found)
    result["ok"] = all(found["ok"] for found in result["models"].values())
    result["picture"] = stages(result, folder / "verify.png").name  # beside the JSON
    write_json(folder / "verify.json", result)
    if json:
        emit(result)
    else:
        say_plainly(f"picture: {folder / result['picture']}\nnumbers: {folder / 'verify.json'}")
        out().print("[green]the numbers agree[/]" if result["ok"] else "[red]the numbers do NOT agree[/]")
    if not result["ok"]:
        raise typer.Exit(DISAGREE)


def _print(name: str, found: dict[str, Any]) -> None:
    """One network's tables."""
    out().rule(f"[bold]{name}")
    fused, skipped, top5 = found["fused"], found["skipped"], found["top5"]
    kinds = Counter(entry["module"] for entry in fused)
    counted = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    say_plainly(f"{len(fused)} blocks fused ({counted}), {len(skipped)} not fused")
    for entry in skipped:
        say_plainly(f"  not fused: {entry['name']} ({entry['module']}): {entry['reason']}")
    _print_numbers(found)
    shared = f"fused and eager {top5['fused_and_eager']:.0%}, eager and float64 {top5['eager_and_float64']:.0%}"
    say_plainly(f"top-5 classes shared: {shared}")
    passes = {"inference": {key: found[key]["eval"] for key in ("time", "traffic", "backends")}}
    if "train" in found:
        passes["training step"] = found["train"]
    for title, of in passes.items():
        _print_costs(title, of["time"], of["traffic"], of.get("saved_bytes"))
    ran = []
    for title, of in passes.items():
        for backend, why in dict.fromkeys((row["backend"], row["why"]) for row in of["backends"]):
            ops = [f"{r['op']} x {r['calls']}" for r in of["backends"] if (r["backend"], r["why"]) == (backend, why)]
            ran.append([title, backend, ", ".join(ops), why])
    show(["pass", "backend", "op and calls", "why"], ran, title="What ran in the fused network")


def _print_numbers(found: dict[str, Any]) -> None:
    training, exact = found["training"], found["training_float64"]
    worst = [
        ("training step, largest", max(training, key=lambda row: row["difference"])),
        ("training step, nearest to its bound", max(training, key=lambda row: row["error"] / row["bound"])),
        ("all in float64, largest", max(exact, key=lambda row: row["difference"])),
    ]
    shown = [("scores, eval", found["scores"]), ("scores, optimized", found["scores_optimized"])]
    shown += [(f"{what}: {row['name']}", row) for what, row in worst]
    lines = []
    for label, row in [*shown, *((row["name"], row) for row in (*training, *exact) if not row["ok"])]:
        figures = (f"{row[k]:.1e}" if row[k] else "" for k in ("difference", "error", "eager_error", "bound"))
        lines.append([label, *figures, "[green]ok[/]" if row["ok"] else "[red]no[/]"])
    all_of_them = f"{len(training)} tensors of a training step, all in --out's JSON"
    headings = ["tensor", "from eager", "from float64", "eager from float64", "bound", ""]
    caption = f"relative to each tensor's largest value; {all_of_them}"
    show(headings, lines, title="Largest differences", caption=caption)


def _print_costs(title: str, time: dict[str, Any], traffic: dict[str, Any], saved: dict[str, int] | None) -> None:
    lines, ratios = [], []
    counted = {v: of for v, of in traffic.items() if v != "minimum"}
    for v in (v for v in time if v != "ratio"):
        line = [v, f"{time[v]['median'] * 1e3:.2f} ms"]
        if of := counted.get(v):
            calls = sum(op["calls"] for op in of["by_op"].values())
            line += [str(calls), str(of["launches"]), f"{of['bytes'] / 1e6:.1f} MB"]
        lines.append([*line, *([f"{saved[v] / 1e6:.1f} MB"] if saved else [])])
        ratios.append(f"{v} {time['eager']['median'] / time[v]['median']:.2f}x")
    lines.append(["minimum", "", "", "", f"{traffic['minimum']['bytes'] / 1e6:.1f} MB"])
    unknown = sorted({op for of in counted.values() for op in of["unknown"]})
    not_counted = f"; not counted: {', '.join(unknown)}" if unknown else ""
    headings = ["", "time", "operators called", "kernel launches", "memory traffic", "kept for backward"]
    title = f"{title}: {' and '.join(ratios[1:])} as fast as eager"
    show(headings, lines, title=title, caption=f"medians of {time['fused']['samples']} interleaved rounds{not_counted}")
