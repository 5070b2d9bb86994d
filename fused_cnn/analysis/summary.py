"""summary(model, input_size): a network's layer table in the papers' form, measured on the real modules.

Multiply-adds are those of convolutions and matrix products, which is what the papers count; parameters are everything
that trains, biases and BatchNorm included. Where a paper prints figures for the network they stand beside the measured
ones, and a footnote says where they differ. For Inception blocks `reductions` shows what the 1x1 layers save.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from .._trees import tensors
from ..nn import Inception
from . import paper
from .paper import Row, convolutions, is_googlenet, is_resnet, stages
from .traffic import Counter, meta_copy


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


_HEADINGS = {"patch_size": "patch/stride", "output_size": "output", "macs": "multiply-adds", "paper": "in the paper"}
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
        model: any module that takes one (N, C, H, W) tensor; GoogLeNets and ResNets, torchvision's too, get their
            papers' rows. It stays as it is: a copy without memory runs.
        input_size: (C, H, W).
        name: what to call it; its class name where not given.

    Raises:
        ValueError: input_size is not three positive numbers.
    """
    if len(input_size) != 3 or min(input_size) < 1:
        raise ValueError(f"input_size must be three positive numbers (C, H, W), got {tuple(input_size)}")
    rows = paper.rows_of(model)
    measure(model, rows, (1, *input_size))
    shown = [_shown(row) for row in rows if row.result is not None]
    total = {"params": sum(row["params"] for row in shown), "macs": sum(row["macs"] for row in shown)}
    result = Summary(name or type(model).__name__, list(input_size), shown, total)
    unused = sum(p.numel() for p in model.parameters()) - total["params"]
    if unused:
        result.notes.append(f"{unused:,} more parameters did not run: training uses them (auxiliary classifiers)")
    if is_googlenet(model) and paper.is_paper_form(model):
        for row in shown:
            if row["name"] in paper.GOOGLENET:
                result.notes += paper.compare(row, row["name"], paper.GOOGLENET[row["name"]])
        result.notes += [*paper.compare(total, "total", paper.GOOGLENET_TOTAL), *paper.GOOGLENET_NOTES]
    elif is_resnet(model):
        _compare_resnet(result, model)
    result.reductions = [
        reduction(row.name, model.get_submodule(row.children[0]), row.input_shape)
        for row in rows
        if row.type == "inception" and row.input_shape is not None and "#3x3 reduce" in row.columns
    ]
    return result


def measure(model: nn.Module, rows: Sequence[Row], input_size: Sequence[int]) -> None:
    """Run the model in eval without computing, for an input of `input_size` (N, C, H, W), and fill in the rows."""
    stand_in = meta_copy(model).eval()
    counter = Counter()

    def before(row: Row, module: nn.Module, inputs: Any) -> None:
        row.input_shape = row.input_shape or tuple(inputs[0].shape)
        row.macs -= counter.counts.flops // 2

    def after(row: Row, module: nn.Module, inputs: Any, result: Any) -> None:
        row.macs += counter.counts.flops // 2
        row.result = next((tuple(t.shape) for t in tensors(result)), None)

    for row in rows:
        children = [stand_in.get_submodule(name) for name in row.children]
        row.params = sum(p.numel() for p in {p for child in children for p in child.parameters()})
        for child in children:
            # A watched child is called as it is, so a ResNet's stem is seen too, which fuses its children.
            child.register_forward_pre_hook(partial(before, row))
            child.register_forward_hook(partial(after, row))
    with counter:
        stand_in(torch.empty(tuple(input_size), device="meta"))


def reduction(name: str, block: nn.Module, input_size: Sequence[int]) -> dict[str, Any]:
    """What the 1x1 reductions of an Inception block save: params, macs and channels of its result for an input of
    `input_size` (N, C, H, W), and with "naive_" before them those of its naive form (arXiv 1409.4842, figure 2, b and
    a). That concatenates the pool as it is: its result is wider, and in a network the next block costs more still."""
    convs = convolutions(block)
    widths = [conv.out_channels for conv in convs]
    with torch.device("meta"):
        naive = Inception(
            convs[0].in_channels, *widths, kernel5=convs[4].kernel_size[0], bias=convs[0].bias is not None,
            norm=any(isinstance(m, nn.BatchNorm2d) for m in block.modules()), reduce=False,
        )  # fmt: skip
    figures: dict[str, Any] = {"name": name}
    for prefix, module in (("", block), ("naive_", naive)):
        row = Row(name, "inception", [""])
        measure(module, [row], input_size)
        assert row.result is not None
        figures |= {f"{prefix}params": row.params, f"{prefix}macs": row.macs, f"{prefix}channels": row.result[1]}
    return figures


def _shown(row: Row) -> dict[str, Any]:
    """The row as plain numbers."""
    assert row.result is not None
    columns = row.columns
    if row.type == "avg pool" and row.input_shape is not None:
        columns = {"patch_size": f"{row.input_shape[2]}x{row.input_shape[3]}/1", **columns}
    _, channels, *size = row.result
    measured = {"output_size": [*(size or [1, 1]), channels], "params": row.params, "macs": row.macs}
    return {"name": row.name, "type": row.type, **columns, **measured}


def _compare_resnet(table: Summary, model: nn.Module) -> None:
    found = stages(model)
    convs = [m for m in found[0][0].children() if isinstance(m, nn.Conv2d)]
    kind = {2: "BasicBlock", 3: "Bottleneck"}.get(len(convs), "")
    printed = paper.RESNETS.get((kind, tuple(map(len, found))))
    stem = convolutions(model.get_submodule("conv1"))[0]
    # Neither grouped nor wide: the paper's first stage is as wide as its stem.
    if printed is None or convs[1].groups > 1 or convs[1].out_channels != stem.out_channels:
        return
    table.notes += paper.compare(table.total, "total", printed)
    if kind == "Bottleneck" and convolutions(found[-1][0])[1].stride[0] > 1:
        table.notes.append(paper.STRIDE_NOTE)
