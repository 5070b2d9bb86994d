"""The PNG plots: a network's time by stage, eager beside fused, and measured speed-ups. matplotlib is
imported only here.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from ._common import require

COLOURS = {"eager": "#9aa5b1", "fused": "#1f77b4", "compile": "#e39c37"}
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


def speedups(rows: list[dict[str, Any]], title: str, path: Path) -> Path:
    """Horizontal bars: each row's {"label", "ratios": {variant: times eager's speed}}. Returns the file."""
    plt = _pyplot()
    variants = sorted({v for row in rows for v in row["ratios"]}, key=lambda v: (v != "fused", v))
    width = 0.8 / max(1, len(variants))
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(rows) * max(1, len(variants)) + 1.4), layout="constrained")
    for i, variant in enumerate(variants):
        places = [p + (i - (len(variants) - 1) / 2) * width for p in range(len(rows))]
        lengths = [row["ratios"].get(variant, 0.0) for row in rows]
        axes.barh(places, lengths, width, label=variant, color=COLOURS.get(variant, OTHER_COLOUR))
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times eager's speed (1 = eager)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(title, loc="left", fontsize=11)
    return _save(figure, path)
