"""Maintenance, during which no VM starts."""

from __future__ import annotations

from datetime import datetime

import msgspec

from ._problem import Problem


class Drain(msgspec.Struct, frozen=True):
    """The daemon drains: no VM starts, also after restarts of the daemon and the host."""

    since: datetime
    stop_grace_s: float | None = None
    """Running VMs are stopped with this grace, and start again afterwards. None: they go on."""


def draining(drain: Drain, *, vm: str | None = None) -> Problem:
    """Returns the 503 for a request that would start a VM."""
    return Problem(
        503,
        "draining",
        f"the daemon is draining for maintenance since {drain.since:%Y-%m-%d %H:%M:%S} UTC, so no VM can start",
        vm=vm,
        hint="`volar system undrain` ends it; running VMs go on",
    )
