"""What the papers print about their networks, and whether a measured figure is the printed one to its last digit.

GoogLeNet: arXiv 1409.4842, Table 1. ResNets: arXiv 1512.03385, Table 1 (multiply-adds, which the paper calls FLOPs),
Figure 3 and Table 6. The papers round down as often as to the nearest, so a figure agrees when rounding it down, up or
to the nearest gives the printed digits.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, NamedTuple


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
