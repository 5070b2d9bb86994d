"""The PNG plots: a network's time by stage, every op under the roofline, images a second, memory, traffic.

Each function returns the file that it wrote. matplotlib is imported only here, and only when something is drawn.
"""

from pathlib import Path
from typing import Any

from ..ceilings import Ceilings
from ..errors import require
from ..results import Result, Row
from .tables import LABELS, named, timed, variants_in

COLOURS = {
    "eager": "#9aa5b1",
    "fused": "#1f77b4",
    "optimized": "#d6336c",
    "fused graph": "#0b3d66",
    "fused compile": "#62b1e8",
    "fused dynamic": "#17a2b8",
    "fused package": "#f08fb1",
    "compile": "#e39c37",
    "reduce-overhead": "#c9a227",
    "autotune": "#b5651d",
    "graph": "#5f6b78",
    "onnxruntime": "#2a9d5c",
    "openvino": "#8e5bb5",
}
OTHER_COLOUR = "#7a7a7a"


def _panels(rows: int, columns: int, figsize: tuple[float, float], **more: Any) -> tuple[Any, Any]:
    """A figure of so many panels, and these."""
    figure = require("matplotlib.figure", "`pip install matplotlib`").Figure(figsize=figsize, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **more)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _save(figure: Any, title: str, path: Path) -> Path:
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path.resolve()


def stages(result: Result, path: Path) -> Path:
    """A row of bars for each network of a verify result: milliseconds of each stage, eager beside fused."""
    models = result["models"]
    figure, panels = _panels(len(models), 1, (11, 3.4 * len(models) + 0.4))
    for (name, found), axes in zip(models.items(), panels[:, 0], strict=True):
        places = range(len(found["stages"]))
        for offset, variant in ((-0.2, "eager"), (0.2, "fused")):
            heights = [stage[variant] * 1e3 for stage in found["stages"]]
            axes.bar([p + offset for p in places], heights, 0.4, label=variant, color=COLOURS[variant])
        axes.set_xticks(list(places), [stage["stage"] for stage in found["stages"]])
        axes.set_ylabel("milliseconds")
        time = found["time"]["eval"]
        medians = " and ".join(f"{v} {time[v]['median'] * 1e3:.1f} ms" for v in ("eager", "fused"))
        axes.set_title(f"{name}: {medians} for the whole network, {time['ratio']:.2f}x", loc="left", fontsize=11)
        axes.legend(frameon=False)
    shape = " x ".join(map(str, result["shape"]))
    return _save(figure, f"Inference by stage, {shape} {result['dtype']}, {result['device_name']}", path)


def roofline(result: Result, path: Path) -> Path:
    """Every op's FLOP/s over its FLOPs per byte, eager and fused, under the measured ceilings; a panel for each dtype
    (Williams et al., Communications of the ACM 52(4), 2009). Operations are those that fused really does; what stays in
    the cache, which the slope does not bind, is pale. Older rows say neither; those that passed their limit are left
    out."""
    ceilings = Ceilings(**result["ceilings"])
    rows = [row for row in timed(result["rows"]) if "bound" in row or max(row["share_of_limit"].values()) <= 1]
    dtypes = sorted({row["dtype"] for row in rows})
    figure, panels = _panels(1, len(dtypes), (6.2 * len(dtypes), 4.8), sharey=True)
    for dtype, axes in zip(dtypes, panels[0], strict=True):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        intensities = [_done(row) / row["bytes"] for row in of_dtype]
        copy, product = ceilings.copy, ceilings.rate(dtype)
        edges = [min(intensities) / 2, product / copy, max(*intensities, product / copy) * 2]
        axes.plot(edges, [min(product, copy * edge) for edge in edges], color="black", linewidth=1, label="limit")
        for variant, marker in (("eager", "x"), ("fused", "o")):
            for label, alpha, in_cache in ((variant, 0.7, False), (f"{variant}, in cache", 0.2, True)):
                some = [row for row in of_dtype if (row.get("bound") == "cache") == in_cache]
                speeds = [_done(row) / row["times"][variant]["median"] for row in some]
                if some:
                    style = {"marker": marker, "alpha": alpha, "color": COLOURS[variant], "label": label}
                    axes.scatter([_done(row) / row["bytes"] for row in some], speeds, s=16, **style)
        axes.set(xscale="log", yscale="log", xlabel="floating-point operations per byte")
        axes.set_title(dtype, loc="left", fontsize=11)
    panels[0][0].set_ylabel("floating-point operations per second")
    panels[0][0].legend(frameon=False)
    return _save(figure, f"Every op, forward and backward, {result['device_name']}", path)


def _done(row: Row) -> int:
    """The operations of the algorithm that fused ran, where the row has them."""
    return row["flops_done" if "flops_done" in row else "flops"]


def images_per_second(result: Result, path: Path) -> Path:
    """Inference, images a second by batch: every variant and the limit, a panel for each network and dtype."""
    rows = sorted(timed(result["rows"]), key=lambda row: row["batch"])
    places = sorted({(row["model"], row["dtype"]) for row in rows})
    figure, panels = _panels(1, len(places), (4.4 * len(places), 4.2))
    for (model, dtype), axes in zip(places, panels[0], strict=True):
        here = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        batches = [row["batch"] for row in here]
        for variant in variants_in(here):
            found = [row for row in here if variant in row["times"]]
            speeds = [row["batch"] / row["times"][variant]["median"] for row in found]
            style = {"color": COLOURS.get(variant, OTHER_COLOUR), "linewidth": 2.5 if variant == "fused" else 1.2}
            axes.plot([r["batch"] for r in found], speeds, marker="o", markersize=4, label=named(variant), **style)
        axes.plot(batches, [r["batch"] / r["limit"] for r in here], "--", color="black", linewidth=1, label="limit")
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, list(map(str, batches)))
        if result["device"] == "cuda":  # where one image is a thousandth of what the device can hold
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("batch")
        axes.set_title(f"{model}, {dtype}", loc="left", fontsize=11)
    panels[0][0].set_ylabel("images per second")
    lines = {label: line for axes in panels[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    return _save(figure, f"Inference, {result['device_name']}", path)


def memory(result: Result, path: Path) -> Path:
    """A training step's memory, eager beside fused: what is kept for backward, and the peak."""
    bars = {"kept for backward": "saved", "peak": "peak"}
    rows = timed(result["rows"])
    groups = {title: [row.get(key) or {"eager": 0, "fused": 0} for row in rows] for title, key in bars.items()}
    return _bars(rows, groups, f"Memory of a training step, {result['device_name']}", path)


def traffic(result: Result, path: Path) -> Path:
    """Bytes that inference or a training step moves, eager, fused and at least."""
    rows = timed(result["rows"])
    groups = {"read and written": [{**row["traffic"], "minimum": row["bytes"]} for row in rows]}
    return _bars(rows, groups, f"Memory traffic, {rows[0]['pass'] if rows else ''}, {result['device_name']}", path)


def _bars(rows: list[Row], groups: dict[str, list[dict[str, int]]], title: str, path: Path) -> Path:
    """A panel for each group of megabytes: a bar for each row and variant."""
    figure, panels = _panels(1, len(groups), (7 * len(groups), 0.42 * len(rows) + 1.6))
    for (name, values), axes in zip(groups.items(), panels[0], strict=True):
        variants = [v for v in values[0] if all(v in of for of in values)] if values else []
        height = 0.8 / max(1, len(variants))
        for i, variant in enumerate(variants):
            places = [p + (i - (len(variants) - 1) / 2) * height for p in range(len(values))]
            megabytes = [v[variant] / 1e6 for v in values]
            axes.barh(places, megabytes, height, label=variant, color=COLOURS.get(variant, OTHER_COLOUR))
        axes.set_yticks(range(len(rows)), [" ".join(str(row[k]) for k in LABELS) for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(f"{name}, MB")
        axes.legend(frameon=False)
    return _save(figure, title, path)
