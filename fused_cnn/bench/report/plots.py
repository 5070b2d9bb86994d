"""The PNG plots: a network's time by stage, every op under the roofline, images a second, memory, traffic. matplotlib is imported only
here.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from ._common import require
from ._result_tables import NAMES, variants_in

COLOURS = {
    "eager": "#9aa5b1",
    "fused": "#1f77b4",
    "fused graph": "#0b3d66",
    "fused compile": "#62b1e8",
    "compile": "#e39c37",
    "autotune": "#b5651d",
    "graph": "#5f6b78",
    "onnxruntime": "#2a9d5c",
    "openvino": "#8e5bb5",
}
OTHER_COLOUR = "#7a7a7a"


def _pyplot() -> ModuleType:
    install = "`pip install matplotlib`"
    require("matplotlib", install).use("Agg")
    return require("matplotlib.pyplot", install)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
    return path.resolve()


def stages(result: dict[str, Any], path: Path) -> Path:
    """One row of bars for each network of a verify result: milliseconds of each stage, eager beside fused.
    Returns the file.
    """
    plt = _pyplot()
    models = result["models"]
    figure, rows = plt.subplots(len(models), 1, figsize=(11, 3.4 * len(models) + 0.4), squeeze=False, layout="constrained")
    for (name, found), axes in zip(models.items(), rows[:, 0], strict=True):
        places = range(len(found["stages"]))
        for offset, variant in ((-0.2, "eager"), (0.2, "fused")):
            heights = [stage[variant] * 1e3 for stage in found["stages"]]
            axes.bar([p + offset for p in places], heights, 0.4, label=variant, color=COLOURS[variant])
        axes.set_xticks(list(places), [stage["stage"] for stage in found["stages"]])
        axes.set_ylabel("milliseconds")
        axes.spines[["top", "right"]].set_visible(False)
        time = found["time"]["eval"]
        medians = " and ".join(f"{v} {time[v]['median'] * 1e3:.1f} ms" for v in ("eager", "fused"))
        axes.set_title(f"{name}: {medians} for the whole network, {time['ratio']:.2f}x", loc="left", fontsize=11)
        axes.legend(frameon=False)
    shape = " x ".join(map(str, result["shape"]))
    figure.suptitle(f"Inference by stage, {shape} {result['dtype']}, {result['device_name']}", fontsize=11)
    return _save(figure, path)


def _timed(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if "error" not in row]


def roofline(result: dict[str, Any], path: Path) -> Path:
    """Every op's FLOP/s over its FLOPs per byte, eager and fused, under the measured ceilings; a panel for each dtype (Williams et al.,
    Communications of the ACM 52(4), 2009). Returns the file.
    """
    plt = _pyplot()
    rows = _timed(result)
    dtypes = sorted({row["dtype"] for row in rows})
    figure, panels = plt.subplots(1, len(dtypes), figsize=(6.2 * len(dtypes), 4.8), squeeze=False, layout="constrained", sharey=True)
    for dtype, axes in zip(dtypes, panels[0], strict=True):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        intensities = [row["flops"] / row["bytes"] for row in of_dtype]
        copy, product = result["ceilings"]["copy"], result["ceilings"]["product"][dtype]
        edges = [min(intensities) / 2, product / copy, max(*intensities, product / copy) * 2]
        axes.plot(edges, [min(product, copy * edge) for edge in edges], color="black", linewidth=1, label="limit")
        for variant, marker in (("eager", "x"), ("fused", "o")):
            speeds = [row["flops"] / row["times"][variant]["median"] for row in of_dtype]
            axes.scatter(intensities, speeds, s=16, marker=marker, alpha=0.7, color=COLOURS[variant], label=variant)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("floating-point operations per byte")
        axes.set_title(dtype, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("floating-point operations per second")
    panels[0][0].legend(frameon=False)
    figure.suptitle(f"Every op, forward and backward, {result['device_name']}", fontsize=11)
    return _save(figure, path)


def images_per_second(result: dict[str, Any], path: Path) -> Path:
    """Inference, images a second by batch: every variant and the limit, a panel for each network and dtype. Returns the file."""
    plt = _pyplot()
    rows = _timed(result)
    places = sorted({(row["model"], row["dtype"]) for row in rows})
    figure, panels = plt.subplots(1, len(places), figsize=(4.4 * len(places), 4.2), squeeze=False, layout="constrained")
    for (model, dtype), axes in zip(places, panels[0], strict=True):
        here = sorted((row for row in rows if (row["model"], row["dtype"]) == (model, dtype)), key=lambda row: row["batch"])
        for variant in variants_in(here):
            points = [(row["batch"], row["batch"] / row["times"][variant]["median"]) for row in here if variant in row["times"]]
            style = {"color": COLOURS.get(variant, OTHER_COLOUR), "linewidth": 2.5 if variant == "fused" else 1.2}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=NAMES.get(variant, variant), **style)
        axes.plot([r["batch"] for r in here], [r["batch"] / r["limit"] for r in here], "--", color="black", linewidth=1, label="limit")
        axes.set_xscale("log", base=2)
        axes.set_xticks([row["batch"] for row in here], [str(row["batch"]) for row in here])
        if result["device"] == "cuda":  # where one image is a thousandth of what the device can hold
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("batch")
        axes.set_title(f"{model}, {dtype}", loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("images per second")
    lines = {label: line for axes in panels[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    figure.suptitle(f"Inference, {result['device_name']}", fontsize=11)
    return _save(figure, path)


def memory(result: dict[str, Any], path: Path) -> Path:
    """A training step's memory, eager beside fused: what is kept for backward, and the peak. Returns the file."""
    bars = {"kept for backward": "saved", "peak": "peak"}
    rows = _timed(result)
    groups = {title: [row.get(key) or {"eager": 0, "fused": 0} for row in rows] for title, key in bars.items()}
    return _pairs(rows, groups, f"Memory of a training step, {result['device_name']}", path)


def traffic(result: dict[str, Any], path: Path) -> Path:
    """Bytes that inference or a training step moves, eager, fused and at least. Returns the file."""
    rows = _timed(result)
    groups = {"read and written": [{**row["traffic"], "minimum": row["bytes"]} for row in rows]}
    return _pairs(rows, groups, f"Memory traffic, {rows[0]['pass'] if rows else ''}, {result['device_name']}", path)


def _pairs(rows: list[dict[str, Any]], groups: dict[str, list[dict[str, int]]], title: str, path: Path) -> Path:
    plt = _pyplot()
    figure, panels = plt.subplots(1, len(groups), figsize=(7 * len(groups), 0.42 * len(rows) + 1.6), squeeze=False, layout="constrained")
    for (name, values), axes in zip(groups.items(), panels[0], strict=True):
        variants = list(values[0]) if values else []
        height = 0.8 / max(1, len(variants))
        for i, variant in enumerate(variants):
            places = [p + (i - (len(variants) - 1) / 2) * height for p in range(len(values))]
            axes.barh(places, [v[variant] / 1e6 for v in values], height, label=variant, color=COLOURS.get(variant, OTHER_COLOUR))
        axes.set_yticks(range(len(rows)), [" ".join(str(row[k]) for k in ("model", "pass", "dtype", "batch")) for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(f"{name}, MB")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    return _save(figure, path)
