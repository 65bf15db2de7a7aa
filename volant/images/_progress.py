"""The progress of a build or fetch."""

from __future__ import annotations

import msgspec


class Progress(msgspec.Struct, frozen=True):
    """The progress of a build or fetch."""

    phase: str
    """`wait`, `update`, `resolve`, `download`, `unpack`, `install`, `compile`, `compose`, `write` or `done`."""
    message: str
    """For people."""
    done: int = 0
    total: int = 0
    unit: str = ""
    """`bytes` if `done` and `total` are counted; else both are 0."""


WAITING = Progress("wait", "Waiting for another build to end")


def silent(progress: Progress) -> None:
    """Ignores progress."""
    del progress
