"""`fused-cnn report`."""

from __future__ import annotations

from ._common import CommandError, Json


def report(json: Json = False) -> None:
    """To be written."""
    raise CommandError("not written yet")
