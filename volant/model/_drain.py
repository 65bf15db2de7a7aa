"""Maintenance: for a while no VM starts."""

from __future__ import annotations

from datetime import datetime

import msgspec

from ._problem import Problem


class Drain(msgspec.Struct, frozen=True):
    """The daemon drains: it lets no VM start until it is told otherwise, over its own restarts and the host's."""

    since: datetime
    stop_grace_s: float | None = None
    """VMs that are up are stopped, each with this grace, and start again afterwards; None: they go on."""


def draining(drain: Drain, *, vm: str | None = None) -> Problem:
    """503: a VM would have to start."""
    return Problem(
        503,
        "draining",
        f"the daemon drains since {drain.since:%Y-%m-%d %H:%M:%S} UTC, for maintenance, and lets no VM start",
        vm=vm,
        hint="`volar system undrain` ends it; VMs that run go on",
    )
