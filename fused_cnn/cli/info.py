"""`fused-cnn info`: which backend is on, or why not and how to turn it on; the build, versions, devices, caches."""

from ..bench.facts import collect
from ._common import Json, emit, show


def info(json: Json = False) -> None:
    """Show each backend (on, or off, why, and how to turn it on), the build, versions, devices and caches."""
    facts = collect()
    if json:
        emit(facts)
        return
    lines = [
        [row["backend"], row["device"], "[green]on[/]" if row["on"] else "[yellow]off[/]", row["reason"], row["hint"]]
        for row in facts["backends"]
    ]
    show(["backend", "device", "state", "why", "to turn it on"], lines, title="Backends")
    for title in ("build", "versions", "devices", "cache"):
        lines = [
            [name, "\n".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value]
            for name, value in facts[title].items()
        ]
        show(["", ""], lines, title=title.capitalize(), show_header=False)
