"""`fused-cnn info`: which backend is on, or why not and how to turn it on; the build, versions, devices, caches."""

from __future__ import annotations

from rich.table import Table

from ..bench.facts import collect
from ._common import Json, emit, out


def info(json: Json = False) -> None:
    """Show each backend (on, or off, why, and how to turn it on), the build, versions, devices and caches."""
    facts = collect()
    if json:
        emit(facts)
        return
    console = out()
    table = Table("backend", "device", "state", "why", "to turn it on", title="Backends")
    for row in facts["backends"]:
        state = "[green]on[/]" if row["on"] else "[yellow]off[/]"
        table.add_row(row["backend"], row["device"], state, row["reason"], row["hint"])
    console.print(table)
    for title in ("build", "versions", "devices", "cache"):
        table = Table(title=title.capitalize(), show_header=False)
        for name, value in facts[title].items():
            lines = [f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else [str(value)]
            table.add_row(name, "\n".join(lines))
        console.print(table)
