"""The papers' tables: which modules make up which row of a network's, what the papers print about it, and whether a
measured figure is the printed one to its last digit.

GoogLeNet: arXiv 1409.4842, Table 1. ResNets: arXiv 1512.03385, Table 1 (multiply-adds, which the paper calls FLOPs),
Figure 3 and Table 6. The forms are recognised by their parts, so torchvision's models have the papers' rows as ours do;
any other network has one row for each of its children. What a row says about its layers is read from the modules. The
papers round down as often as to the nearest, so a figure agrees when rounding it down or up gives the printed digits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, NamedTuple

from torch import nn

from ..nn import MaxPool2d


@dataclass
class Row:
    """The children whose work a row shows and what it says about them; measured: their parameters that train, their
    multiply-adds, and their shapes in and out, None for what did not run."""

    name: str
    type: str
    children: list[str]
    columns: dict[str, Any] = field(default_factory=dict)
    params: int = 0
    macs: int = 0
    input_shape: tuple[int, ...] | None = None
    result: tuple[int, ...] | None = None


def rows_of(model: nn.Module) -> list[Row]:
    """The rows of this network's table, in the order in which they run."""
    if is_googlenet(model):
        return list(_googlenet(model))
    if is_resnet(model):
        return list(_resnet(model))
    return [Row(name, type(child).__name__, [name]) for name, child in model.named_children()]


def is_googlenet(model: nn.Module) -> bool:
    """Whether the network has GoogLeNet's nine blocks, by torchvision's names."""
    return all(is_inception(getattr(model, f"inception{name}", None)) for name in ("3a", "4e", "5b"))


def is_resnet(model: nn.Module) -> bool:
    """Whether the network has a ResNet's stem and stages, by torchvision's names."""
    return all(hasattr(model, name) for name in ("conv1", "bn1", "layer1", "fc")) and bool(stages(model))


def is_inception(module: Any) -> bool:
    """Whether a module has the four branches of an Inception block, reduced or naive."""
    return isinstance(module, nn.Module) and all(hasattr(module, f"branch{i}") for i in (1, 2, 3, 4)) and (
        isinstance(module.branch2, nn.Sequential) and len(module.branch2) in (1, 2)
    )  # fmt: skip


def is_paper_form(model: nn.Module) -> bool:
    """Whether a GoogLeNet is the paper's: 5x5 convolutions, the reductions, and no BatchNorm."""
    block = model.get_submodule("inception3a")
    convs = convolutions(block)
    return len(convs) == 6 and convs[4].kernel_size[0] == 5 and convs[4].bias is not None


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    """The convolutions inside, in the order of their registration."""
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


def stages(model: nn.Module) -> list[nn.Sequential]:
    """A ResNet's stages: layer1, layer2, ... as long as they are there."""
    found: list[nn.Sequential] = []
    while isinstance(stage := getattr(model, f"layer{len(found) + 1}", None), nn.Sequential) and len(stage):
        found.append(stage)
    return found


def _patch(module: Any) -> str:
    """`7x7/2`: kernel and stride."""
    kernel, stride = (v if isinstance(v, int) else v[0] for v in (module.kernel_size, module.stride))
    return f"{kernel}x{kernel}/{stride}"


def _googlenet(model: nn.Module) -> Iterator[Row]:
    children = dict(model.named_children())
    conv1, conv2, conv3 = (convolutions(children[name])[0] for name in ("conv1", "conv2", "conv3"))
    yield Row("conv1", "convolution", ["conv1"], {"patch_size": _patch(conv1), "depth": 1})
    yield Row("maxpool1", "max pool", ["maxpool1"], {"patch_size": _patch(children["maxpool1"]), "depth": 0})
    columns: dict[str, Any] = {"patch_size": _patch(conv3), "depth": 2}
    columns |= {"#3x3 reduce": conv2.out_channels, "#3x3": conv3.out_channels}
    yield Row("conv2", "convolution", ["conv2", "conv3"], columns)
    for name, child in children.items():
        if is_inception(child):
            label = name.replace("inception", "inception_")
            widths = _widths(child)
            yield Row(label, "inception", [name], {"depth": 2 if "#3x3 reduce" in widths else 1, **widths})
        elif name in ("maxpool2", "maxpool3", "maxpool4"):
            yield Row(name, "max pool", [name], {"patch_size": _patch(child), "depth": 0})
    yield Row("avgpool", "avg pool", ["avgpool"], {"depth": 0})
    yield Row("dropout", f"dropout ({children['dropout'].p:.0%})", ["dropout"], {"depth": 0})
    yield Row("linear", "linear", ["fc"], {"depth": 1})


def _widths(block: nn.Module) -> dict[str, int]:
    """The columns of Table 1: the channels of an Inception block's convolutions; the naive form has three."""
    channels = [conv.out_channels for conv in convolutions(block)]
    if len(channels) == 3:
        return dict(zip(("#1x1", "#3x3", "#5x5"), channels, strict=True))
    names = ("#1x1", "#3x3 reduce", "#3x3", "#5x5 reduce", "#5x5", "pool proj")
    return dict(zip(names, channels, strict=True))


def _resnet(model: nn.Module) -> Iterator[Row]:
    children = dict(model.named_children())
    stem = convolutions(children["conv1"])[0]
    yield Row("conv1", "convolution", ["conv1", "bn1"], {"layers": f"{_patch(stem)}, {stem.out_channels}"})
    for i, stage in enumerate(stages(model)):
        parts = [f"layer{i + 1}"]
        layers = _blocks(stage)
        if i == 0 and isinstance(children.get("maxpool"), (nn.MaxPool2d, MaxPool2d)):
            parts.insert(0, "maxpool")
            layers = f"{_patch(children['maxpool'])} max pool; {layers}"
        yield Row(f"conv{i + 2}_x", "stage", parts, {"layers": layers})
    pool = "avgpool" if "avgpool" in children else "global_pool"
    yield Row("avgpool", "avg pool", [pool] if pool in children else [])
    yield Row("fc", "linear", ["fc"], {"layers": f"{getattr(children['fc'], 'out_features', '')}-d fc"})


def _blocks(stage: nn.Sequential) -> str:
    """`[1x1, 64; 3x3, 64; 1x1, 256] x 3`: the convolutions of a block, and how many blocks."""
    convs = [m for m in stage[-1].children() if isinstance(m, nn.Conv2d)]
    parts = [f"{c.kernel_size[0]}x{c.kernel_size[0]}, {c.out_channels}" for c in convs]
    return f"[{'; '.join(parts)}] x {len(stage)}"


class Printed(NamedTuple):
    """A row's figures as the paper prints them; None where it prints none."""

    params: str | None
    ops: str | None


GOOGLENET = {
    "conv1": Printed("2.7K", "34M"),
    "conv2": Printed("112K", "360M"),
    "inception_3a": Printed("159K", "128M"),
    "inception_3b": Printed("380K", "304M"),
    "inception_4a": Printed("364K", "73M"),
    "inception_4b": Printed("437K", "88M"),
    "inception_4c": Printed("463K", "100M"),
    "inception_4d": Printed("580K", "119M"),
    "inception_4e": Printed("840K", "170M"),
    "inception_5a": Printed("1072K", "54M"),
    "inception_5b": Printed("1388K", "71M"),
    "linear": Printed("1000K", "1M"),
}
GOOGLENET_TOTAL = Printed(None, "1.5G")  # section 1: "a computational budget of 1.5 billion multiply-adds"

# By block and blocks per stage. Plain nets: Figure 3 (3.6 billion for 34 layers), as their shortcuts cost nothing in
# option A.
RESNETS = {
    ("BasicBlock", (2, 2, 2, 2)): Printed(None, "1.8G"),
    ("BasicBlock", (3, 4, 6, 3)): Printed(None, "3.6G"),
    ("Bottleneck", (3, 4, 6, 3)): Printed(None, "3.8G"),
    ("Bottleneck", (3, 4, 23, 3)): Printed(None, "7.6G"),
    ("Bottleneck", (3, 8, 36, 3)): Printed(None, "11.3G"),
    ("BasicBlock", (3, 3, 3)): Printed("0.27M", None),
    ("BasicBlock", (5, 5, 5)): Printed("0.46M", None),
    ("BasicBlock", (7, 7, 7)): Printed("0.66M", None),
    ("BasicBlock", (9, 9, 9)): Printed("0.85M", None),
    ("BasicBlock", (18, 18, 18)): Printed("1.7M", None),
}

# Table 1 of 1409.4842 counts parameters in units of 1024: 1024 x 1000 weights are its "1000K".
_UNITS = {"K": 1024, "M": 10**6, "G": 10**9}


def agrees(value: int, printed: str) -> bool:
    """Whether `value`, rounded down or up to the digits of `printed` ("159K", "1.8G"), can be what was printed."""
    digits = Decimal(printed[:-1])
    last = Decimal(1).scaleb(int(digits.as_tuple().exponent))
    exact = Decimal(value) / _UNITS[printed[-1]]
    return digits in (exact.quantize(last, rounding) for rounding in (ROUND_FLOOR, ROUND_CEILING))


def compare(row: dict[str, Any], name: str, printed: Printed) -> list[str]:
    """Put the printed figures into a row. A sentence for each that its architecture does not give, which shows the
    architecture's with one digit more."""
    differences = []
    figures = (("parameters", row["params"], printed.params), ("multiply-adds", row["macs"], printed.ops))
    for what, value, text in figures:
        if text is not None and not agrees(value, text):
            places = len(text[:-1].partition(".")[2]) + 1
            has = f"{value / _UNITS[text[-1]]:.{places}f}{text[-1]} ({value:,})"
            differences.append(f"{name}: the paper prints {text} {what}; the architecture has {has}")
    row["paper"] = {**printed._asdict(), "agrees": not differences}
    return differences


GOOGLENET_NOTES = (
    "conv1: 2.7K and 34M are the figures of a depthwise-separable first layer (7x7 with 8 outputs per input "
    "channel: 1,176 weights; then 1x1 to 64: 1,536), not of the 7x7 convolution with 9,408 weights that the "
    "paper's Figure 3 draws",
    "inception_4a to inception_5b: the printed parameters do not follow from the printed channels; the "
    "printed ops do, but for inception_5a, whose ops are those of its printed parameters",
)
STRIDE_NOTE = (
    "here the stride sits in the 3x3 convolutions, as in torchvision; the paper has it in the first 1x1, "
    "which gives its multiply-adds (the models whose names end in _paper)"
)
