"""Tables in Markdown and plots of saved results.

Tables are named verify, inference, training, memory-inference, memory-training, ops, steps, kernels-MODEL-PASS and
load, with `-cuda` added where a GPU made them, headlines, and `ran`: which kernels have run on which GPU.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import RequestError
from ..results import Result, newest
from . import plots, ran, tables
from .tables import markdown, source

MARKED = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
SUFFIX = {"cpu": "", "cuda": "-cuda"}


def tables_of(results: Sequence[Result]) -> dict[str, str]:
    """Every table that results have, by name."""
    found = {}
    latest = newest(results)
    for result in latest:
        name, rows, suffix = result["table"], result["rows"], SUFFIX[result["device"]]
        if result["kind"] == "verify":
            found[name + suffix] = markdown(*tables.verify(result)) + source(result)
        elif result["kind"] == "kernels":
            found[name + suffix] = markdown(*tables.steps(rows)) + source(result)
            for model, step in dict.fromkeys((row["model"], row["pass"]) for row in rows):
                of_step = [row for row in rows if (row["model"], row["pass"]) == (model, step)]
                found[f"kernels-{model}-{step.split()[0]}{suffix}"] = markdown(*tables.kernels(of_step))
        elif result["kind"] == "load":
            found[name + suffix] = markdown(*tables.load(rows)) + source(result)
        else:
            subject = rows[0]["kind"]
            found[name + suffix] = markdown(*tables.bench(rows, subject)) + tables.remarks(rows) + source(result)
            if subject == "model":
                found[f"memory-{name}{suffix}"] = markdown(*tables.memory(rows))
    for device, suffix in SUFFIX.items():
        networks = [r for r in latest if r["device"] == device and r["table"] in ("inference", "training", "steps")]
        found[f"headlines{suffix}"] = markdown(*tables.headlines(networks))
    found["ran"] = markdown(*ran.table(results))
    return found


def draw(result: Result, folder: Path) -> list[Path]:
    """The PNG plots of one of newest()'s results, in the folder."""
    table, suffix = result["table"], f"{SUFFIX[result['device']]}.png"
    if table == "verify":
        return [plots.stages(result, folder / f"verify{suffix}")]
    if table in ("steps", "load") or all("error" in row for row in result["rows"]):
        return []
    if table == "ops":
        return [plots.roofline(result, folder / f"roofline{suffix}")]
    counted = [row for row in result["rows"] if "traffic" in row]
    made = [plots.traffic({**result, "rows": counted}, folder / f"traffic-{table}{suffix}")] if counted else []
    if table == "inference":
        return [*made, plots.images_per_second(result, folder / f"images{suffix}")]
    return [*made, plots.memory(result, folder / f"memory{suffix}")]


def rewritten(text: str, tables: Mapping[str, str]) -> tuple[str, list[str]]:
    """The text with tables between their markers, and the names of those that were."""
    names = {m["name"] for m in MARKED.finditer(text)} & tables.keys()
    return MARKED.sub(lambda m: m[1] + tables[m["name"]] + m[3] if m["name"] in tables else m[0], text), sorted(names)


def rewrite(file: Path, tables: Mapping[str, str]) -> list[str]:
    """Put tables between their markers in a file; returns the names of those that were."""
    new, names = rewritten(file.read_text(), tables)
    if not names:
        missing = f"{file} has no marker for {', '.join(tables)}"
        raise RequestError(f"{missing}: add `<!-- table:NAME -->` and `<!-- /table -->`")
    file.write_text(new)
    return names
