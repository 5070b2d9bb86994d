"""`fused-cnn summary`."""

from __future__ import annotations

from ._common import CommandError, Json


def summary(json: Json = False) -> None:
    """To be written."""
    raise CommandError("not written yet")
