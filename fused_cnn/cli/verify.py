"""`fused-cnn verify`."""

from __future__ import annotations

from ._common import CommandError, Json


def verify(json: Json = False) -> None:
    """To be written."""
    raise CommandError("not written yet")
