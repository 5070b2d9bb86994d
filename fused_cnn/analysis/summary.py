"""summary(model, input_size): a network's layer table in the papers' form, measured on the real modules.

Multiply-adds are those of convolutions and matrix products, which is what the papers count; parameters are
everything that trains, biases and BatchNorm included. Where a paper prints figures for the network they stand
beside the measured ones, and a footnote says where they differ. For Inception blocks `reductions` shows what
the 1x1 layers save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from . import paper
from .layout import Row, convolutions, is_googlenet, is_paper_form, is_resnet, rows_of, stages
from .measure import Measured, measure
from .reductions import reduction


@dataclass
class Summary:
    """The table: rows and total as plain numbers, footnotes, and what Inception's 1x1 layers save."""

    model: str
    input_size: list[int]
    rows: list[dict[str, Any]]
    total: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    reductions: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Each row has at least name, type, output_size ([H, W, C] or [C]), params and macs."""
        return asdict(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows of text, the total last, without empty columns; "*" marks a footnote."""
        rows = [*self.rows, {"name": "total", **self.total}]
        columns = [c for c in _COLUMNS if any(c in row for row in rows)]
        body = [[_cell(row, column) for column in columns] for row in rows]
        return [_HEADINGS.get(column, column) for column in columns], body


_HEADINGS = {
    "patch_size": "patch/stride",
    "output_size": "output",
    "macs": "multiply-adds",
    "paper": "in the paper",
}
_COLUMNS = (
    *("name", "type", "patch_size", "layers", "output_size", "depth"),
    *("#1x1", "#3x3 reduce", "#3x3", "#5x5 reduce", "#5x5", "pool proj", "params", "macs", "paper"),
)


def _cell(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None or (value == 0 and column in ("params", "macs")):
        return ""
    if column == "output_size":
        return "x".join(map(str, value))
    if column == "macs":
        return f"{value / 1e6:,.1f}M"
    if column == "paper":
        figures = " / ".join(text for text in (value["params"], value["ops"]) if text)
        return figures if value["agrees"] else f"{figures} *"
    return f"{value:,}" if isinstance(value, int) else str(value)


def summary(model: nn.Module, input_size: Sequence[int], name: str | None = None) -> Summary:
    """The layer table of a network in eval, per image.

    Args:
        model: any module that takes one (N, C, H, W) tensor; GoogLeNets and ResNets, torchvision's too, get
            their papers' rows. It stays as it is: a copy without memory runs.
        input_size: (C, H, W).
        name: what to call it; its class name where not given.

    Returns:
        Rows with params (weights that train) and macs (multiply-adds of convolutions and matrix products),
        and their total.

    Raises:
        ValueError: input_size is not three positive numbers.
    """
    if len(input_size) != 3 or min(input_size) < 1:
        raise ValueError(f"input_size must be three positive numbers (C, H, W), got {tuple(input_size)}")
    specs = rows_of(model)
    measured = measure(model, specs, (1, *input_size))
    rows = [_row(spec, m) for spec, m in zip(specs, measured, strict=True) if m.result is not None]
    total = {"params": sum(row["params"] for row in rows), "macs": sum(row["macs"] for row in rows)}
    result = Summary(name or type(model).__name__, list(input_size), rows, total)
    unused = sum(p.numel() for p in model.parameters()) - total["params"]
    if unused:
        result.notes.append(f"{unused:,} more parameters did not run: training uses them (auxiliary classifiers)")
    if is_googlenet(model) and is_paper_form(model):
        _compare_googlenet(result)
    elif is_resnet(model):
        _compare_resnet(result, model)
    blocks = zip(specs, measured, strict=True)
    result.reductions = [
        reduction(row.name, model.get_submodule(row.children[0]), m.taken)
        for row, m in blocks
        if row.type == "inception" and m.taken is not None and "#3x3 reduce" in row.columns
    ]
    return result


def _row(spec: Row, measured: Measured) -> dict[str, Any]:
    assert measured.result is not None
    columns = {key: value for key, value in spec.columns.items() if value is not None}
    if spec.type == "avg pool" and measured.taken is not None:
        columns = {"patch_size": f"{measured.taken[2]}x{measured.taken[3]}/1", **columns}
    _, channels, *size = measured.result
    return {
        "name": spec.name,
        "type": spec.type,
        **columns,
        "output_size": [*(size or [1, 1]), channels],
        "params": measured.params,
        "macs": measured.macs,
    }


def _compare(row: dict[str, Any], name: str, printed: paper.Printed) -> list[str]:
    """Put the printed figures into a row; the sentences about those that differ."""
    differences = paper.disagreements(name, row["params"], row["macs"], printed)
    row["paper"] = {**printed._asdict(), "agrees": not differences}
    return differences


def _compare_googlenet(table: Summary) -> None:
    for row in table.rows:
        if row["name"] in paper.GOOGLENET:
            table.notes += _compare(row, row["name"], paper.GOOGLENET[row["name"]])
    table.notes += [*_compare(table.total, "total", paper.GOOGLENET_TOTAL), *paper.GOOGLENET_NOTES]


def _compare_resnet(table: Summary, model: nn.Module) -> None:
    found = stages(model)
    block = next(found[0].children())
    convs = [m for m in block.children() if isinstance(m, nn.Conv2d)]
    kind = {2: "BasicBlock", 3: "Bottleneck"}.get(len(convs), "")
    printed = paper.RESNETS.get((kind, tuple(len(list(stage.children())) for stage in found)))
    stem = convolutions(model.get_submodule("conv1"))[0]
    # Neither grouped nor wide: the paper's first stage is as wide as its stem.
    if printed is None or convs[1].groups > 1 or convs[1].out_channels != stem.out_channels:
        return
    table.notes += _compare(table.total, "total", printed)
    strides = [conv.stride[0] for conv in convolutions(next(found[-1].children()))]
    if kind == "Bottleneck" and strides[1] > 1:
        table.notes.append(paper.STRIDE_NOTE)
