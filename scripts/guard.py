"""`make guard`: holds the project to benchmarks/guard.json, a table of what needs no GPU and no clock to be measured.

For GoogLeNet and ResNet-50: kernel launches, counted bytes of traffic and bytes kept for backward, on the CPU with
AVX2's kernels. For every GPU kernel, from what `scripts/compile_check.py --json` saved: the most registers, spilled
bytes, stack and shared memory that any of its instances needs. A number that became larger fails, and so does a kernel
that the table does not know or no longer finds; `make guard-update` writes the table anew, for a change that is meant.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from fused_cnn import _library, fuse_
from fused_cnn.analysis import Counts, count, saved_bytes
from fused_cnn.bench.network_benches import MODELS
from fused_cnn.bench.numbers import training_step

TABLE = Path(__file__).resolve().parents[1] / "benchmarks" / "guard.json"
LEVEL = "avx2"  # counts depend on the instruction set that weights are packed for
COSTS = ("registers", "spilled", "stack", "shared")
Numbers = dict[str, int]


def numbers(counts: Counts) -> Numbers:
    """An op that the counter does not know is a number, too, or it would make the others look better."""
    return {"launches": counts.launches, "traffic": counts.bytes, "unknown": sum(counts.unknown.values())}


def models() -> dict[str, Numbers]:
    """Eager's and the fused network's counts, at batch 1, float32, 224 x 224."""
    if not _library.set_cpu_level(LEVEL):
        sys.exit(f"guard: the counts are those of the {LEVEL} kernels, which do not run here")
    found: dict[str, Numbers] = {}
    images = torch.zeros(1, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    for name in MODELS:
        options = {"init_weights": False} if name == "googlenet" else {}
        for variant in ("eager", "fused"):
            network: nn.Module = torchvision.models.get_model(name, weights=None, **options).to(
                memory_format=torch.channels_last
            )
            if variant == "fused":
                fuse_(network, backend="native")  # by name: of so few images a part would be PyTorch's in training
            network.eval()
            with torch.no_grad():
                network(images)  # folds and packs
                counts = count(network, images)
            found[f"{name} {variant} inference"] = numbers(counts)
            network.train()
            pair = torch.cat([images, images])
            counts = count(training_step, network, pair)
            found[f"{name} {variant} training step"] = {**numbers(counts), "saved": saved_bytes(network, pair)}
    return found


def kernels(checks: list[dict[str, Any]]) -> dict[str, dict[str, Numbers]]:
    """By compiler, then by kernel and architecture."""
    found: dict[str, dict[str, Numbers]] = {}
    for check in checks:
        for kernel in check["kernels"]:
            compiler = f"triton {check['triton']}" if kernel["source"].endswith(".py") else f"nvcc {check['nvcc']}"
            name = re.split(r"[<\s]", kernel["name"])[0]  # without types and tiles
            row = found.setdefault(compiler, {}).setdefault(
                f"{kernel['source']}: {name}, {kernel['arch']}", dict.fromkeys(COSTS, 0)
            )
            for cost in COSTS:
                row[cost] = max(row[cost], kernel[cost])
    return found


def differences(table: dict[str, Numbers], now: dict[str, Numbers]) -> tuple[list[str], list[str]]:
    """What is worse than in the table, or not the same set of rows; and what is better."""
    worse = [f"{name}: not in the table" for name in now.keys() - table.keys()]
    worse += [f"{name}: in the table, but gone" for name in table.keys() - now.keys()]
    better = []
    for name in sorted(table.keys() & now.keys()):
        for what, value in now[name].items():
            line = f"{name}: {what} {table[name][what]} -> {value}"
            if value != table[name][what]:
                (worse if value > table[name][what] else better).append(line)
    return sorted(worse), better


def architectures(rows: dict[str, Numbers]) -> set[str]:
    return {name.rpartition(", ")[2] for name in rows}


def compare(table: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Both parts; kernels of compilers and architectures that both have."""
    worse, better = differences(table["models"], now["models"])
    for compiler, rows in now["kernels"].items():
        if compiler not in table["kernels"]:
            better.append(f"not compared: the table has no {compiler}")
            continue
        known = table["kernels"][compiler]
        shared = architectures(rows) & architectures(known)
        both = ({k: v for k, v in part.items() if k.rpartition(", ")[2] in shared} for part in (known, rows))
        found = differences(*both)
        worse += [f"{compiler}, {line}" for line in found[0]]
        better += [f"{compiler}, {line}" for line in found[1]]
    return worse, better


def written(document: dict[str, Any]) -> str:
    """A line for each row."""

    def lines(rows: dict[str, Numbers], indent: int) -> str:
        pad = " " * indent
        return (
            "{\n"
            + ",\n".join(f"{pad}{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
            + f"\n{pad[:-2]}}}"
        )

    compilers = ",\n".join(f"    {json.dumps(c)}: {lines(rows, 6)}" for c, rows in sorted(document["kernels"].items()))
    return f'{{\n  "models": {lines(document["models"], 4)},\n  "kernels": {{\n{compilers}\n  }}\n}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checks", nargs="*", type=Path, help="files that compile_check.py --json saved")
    parser.add_argument("--update", action="store_true", help="write the table from what is measured now")
    arguments = parser.parse_args()
    now = {"models": models(), "kernels": kernels([json.loads(path.read_text()) for path in arguments.checks])}
    table = json.loads(TABLE.read_text())
    if arguments.update:
        now["kernels"] = {**table["kernels"], **now["kernels"]}  # those of compilers that are not here stay
        TABLE.write_text(written(now))
        print(f"guard: wrote {TABLE}")
        return 0
    worse, better = compare(table, now)
    for line in better:
        print(f"better: {line}" if "->" in line else line)
    for line in worse:
        print(f"worse: {line}")
    kernels_here = sum(map(len, now["kernels"].values()))
    print(
        f"guard: compared {len(now['models'])} passes and {kernels_here} kernels of "
        f"{', '.join(now['kernels']) or 'no compiler'}"
    )
    print(
        f"guard: {len(worse)} worse than {TABLE.name}; `make guard-update` accepts them"
        if worse
        else "guard: nothing is worse"
    )
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
